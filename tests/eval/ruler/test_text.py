"""Keys and prose of haystacks."""

import json

import pytest

from gdn2_jax.eval.ruler.essays import read_essays, split_sentences
from gdn2_jax.eval.ruler.words import Keys, short_keys


def test_keys_are_the_sorted_set_of_all_pairs():
  adjectives = ["red", "blue", "blue-eyed", "x", "ad hoc", "red", "blue-e"]
  nouns = ["eyed-cat", "cat", "zoo", "e-mail", "cat", "mail"]
  keys = Keys("test", adjectives, nouns)
  want = sorted({f"{a}-{n}" for a in adjectives for n in nouns})
  assert list(keys) == want and len(keys) == len(want)
  assert [keys[i] for i in range(len(want))] == want
  assert keys[-1] == want[-1] and keys[2:5] == want[2:5]
  with pytest.raises(IndexError):
    keys[len(want)]
  assert len(set(short_keys())) == len(short_keys()) > 20_000


def test_essays_are_read_from_json_and_plain_text(tmp_path):
  text = "One  two.\nThree?\tFour"
  plain, rulers, list_of = (tmp_path / n for n in ("a.txt", "b.json", "c.json"))
  plain.write_text(text)
  rulers.write_text(json.dumps({"text": text}))
  list_of.write_text(json.dumps({"text": text.split("\n")}))
  found = [read_essays(str(path)) for path in (plain, rulers, list_of)]
  assert {e.words for e in found} == {("One", "two.", "Three?", "Four")}
  assert [e.label for e in found] == ["a.txt", "b.json", "c.json"]
  assert len({e.sha256 for e in found}) == 1
  assert split_sentences(" ".join(found[0].words)) == [
    "One two.",
    "Three?",
    "Four",
  ]


@pytest.mark.parametrize(
  "content", ["[1]", '{"text": 3}', "{", '{"text": " "}']
)
def test_a_file_without_essays_is_refused(tmp_path, content):
  file = tmp_path / "essays.json"
  file.write_text(content)
  with pytest.raises(ValueError, match=r"^--essays=.*essays\.json: "):
    read_essays(str(file))


def test_python_docs_stand_in_for_essays(monkeypatch):
  # The whole corpus takes seconds to read.
  from gdn2_jax.data.text import corpus
  from gdn2_jax.eval.ruler import essays

  monkeypatch.setattr(
    essays, "read_corpus", lambda _: corpus.read_corpus("snapshot")
  )
  found = read_essays(None)
  assert found.label == "python-docs (not the paper's)"
  assert len(found.words) > 20_000
