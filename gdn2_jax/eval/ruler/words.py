"""Keys of needles: pairs of an adjective and a noun.

RULER and lm-eval use the lists of the package wonderwords, six million pairs.
Without it the short lists below take their place; results stay comparable with
one another, but keys are shorter and more frequent words.
"""

import bisect
import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from typing import overload, override

from gdn2_jax.files import sha256_bytes

_ADJECTIVES = (
  "able amber ancient angry autumn bare big bitter blue bold brave brief "
  "bright broad broken calm careful cheap civil clean clear clever cold "
  "common cool costly crisp curious daily damp dark deep dense distant dry "
  "dusty eager early empty equal even exact faint fair famous fast fine firm "
  "flat formal free fresh gentle glad golden grand gray great green happy "
  "hard heavy hidden hollow honest huge humble idle inner keen kind large "
  "late light little local lone long loud loyal lucky mild modern narrow neat "
  "new noble odd old open outer pale patient plain polite proud pure quick "
  "quiet rapid rare ready red rich rough round royal rural safe sharp short "
  "silent silver simple slow small smooth soft solid steady steep still "
  "strange strong sunny sweet swift tall tame thick thin tidy tiny urban vast "
  "warm weak wide wild wise wooden young"
)
_NOUNS = (
  "acorn anchor apple arch arrow badge bakery barn basin basket beach bell "
  "bench bird boat bottle bow branch bread brick bridge broom brush bucket "
  "cabin camera candle canyon card carpet castle cave chair chalk cherry "
  "church circle cliff clock cloud coast coat coin comet copper cottage crane "
  "creek crown cup curtain desk door dove drum eagle engine fabric farm "
  "feather fence ferry field flag flame flute forest forge fountain fox "
  "garden garlic gate glass globe glove goose grain grove hammer harbor hat "
  "hedge hill horn horse island jacket jar kettle key kitchen kite ladder "
  "lake lamp lantern leaf lemon letter library lily lion map market meadow "
  "mill mirror moon mountain nail needle nest oak oar onion orchard otter owl "
  "palace paper parrot path pebble pencil piano pillow pine planet plum pond "
  "pottery quill rabbit rail raven ribbon ring river road robin roof rope "
  "rose sail salt sand saddle school seed shell ship shore shovel silk spoon "
  "spring stable star statue stone stove stream street table tea temple tent "
  "thread tiger tower town train tree trumpet tunnel valley vase village "
  "violin wagon wall watch wave well whale wheel willow window winter wolf "
  "wool yard"
)


class Keys(Sequence[str]):
  """All "adjective-noun" pairs in alphabetic order, made when asked for.

  Equal to sorted({f"{a}-{n}" for a in adjectives for n in nouns}), which for
  the lists of wonderwords takes more than half a gigabyte.

  Attributes:
    label: source of the words, for reports.
    sha256: of both lists.
  """

  def __init__(
    self, label: str, adjectives: Iterable[str], nouns: Iterable[str]
  ):
    self.label = label
    stems = sorted({f"{adjective}-" for adjective in adjectives})
    self._nouns = sorted(set(nouns))
    lists = "\n".join([*stems, "", *self._nouns])
    self.sha256 = sha256_bytes(lists.encode())
    # Pairs of different stems are in the order of their stems, unless one stem
    # begins with the other ("blue-", "blue-eyed-"): those are sorted together.
    self._parts: list[str | list[str]] = []
    self._ends: list[int] = []
    while stems:
      first = stems[0]
      family = [stem for stem in stems if stem.startswith(first)]
      stems = stems[len(family) :]
      part: str | list[str] = first
      if len(family) > 1:
        part = sorted({stem + noun for stem in family for noun in self._nouns})
      self._parts.append(part)
      size = len(self._nouns) if isinstance(part, str) else len(part)
      self._ends.append(size + (self._ends[-1] if self._ends else 0))

  @override
  def __len__(self) -> int:
    return self._ends[-1]

  @override
  def __iter__(self) -> Iterator[str]:
    for part in self._parts:
      if isinstance(part, str):
        yield from (part + noun for noun in self._nouns)
      else:
        yield from part

  @overload
  def __getitem__(self, index: int) -> str: ...

  @overload
  def __getitem__(self, index: slice) -> list[str]: ...

  @override
  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    index = range(len(self))[index]  # negative ones, and IndexError
    part = bisect.bisect_right(self._ends, index)
    found = self._parts[part]
    at = index - (self._ends[part - 1] if part else 0)
    return found + self._nouns[at] if isinstance(found, str) else found[at]


def load_keys() -> Keys:
  """Keys of wonderwords' lists if it is installed, else of the short lists."""
  try:
    import wonderwords
  except ImportError:
    return short_keys()
  words = wonderwords.RandomWord()
  return Keys(
    f"wonderwords {importlib.metadata.version('wonderwords')}",
    words.filter(include_categories=["adjectives"]),
    words.filter(include_categories=["nouns"]),
  )


def short_keys() -> Keys:
  """Keys of the lists of this module."""
  return Keys("short lists", _ADJECTIVES.split(), _NOUNS.split())
