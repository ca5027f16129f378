"""Path of every warpgroup through a kernel, by rules for its branches.

specs.toml lists a rule for every conditional branch in the order of the code.
Spin waits on barriers need none: schedule.py models their time.
"""

import collections
from collections.abc import Mapping, Sequence

from tools.kernel_model.sass import Instruction

_SPIN = 12  # instructions of a spin wait, at most
_LIMIT = 2_000_000  # instructions of a path, at most
_SHOWN = ("UTMALDG", "UTMASTG", "HGMMA")  # tell what a branch guards
_HELP = """\
Correct "branches" of the kernel's table at this place of the order:
  backward: "loop N" (N turns of the loop, or "loop chunks")
  forward: the warpgroups that jump over what is skipped: "wg0", "not wg0",
           "last of N", "wg1 or last of chunks", "always", "never\""""


class UndecidedBranch(ValueError):
  """Rules that do not fit the branches; the message lists both."""


def is_taken(rule: str, warpgroup: int, visit: int, chunks: int) -> bool:
  """True if a warpgroup takes a branch on its visit 0, 1, ...

  Args:
    rule: terms joined by " or ": "loop N", "last of N", "wgN", "not wgN",
      "always", "never"; N may be "chunks".
    warpgroup: its number.
    visit: number of earlier visits of this warpgroup.
    chunks: number of chunks that the kernel walks over.

  Raises:
    ValueError: the rule cannot be read.
  """
  return any(
    _holds(term, rule, warpgroup, visit)
    for term in rule.replace("chunks", str(chunks)).split(" or ")
  )


def _holds(term, rule, warpgroup, visit):
  match term.split():
    case ["loop", n] if n.isdigit():
      return visit % int(n) != int(n) - 1
    case ["last", "of", n] if n.isdigit():
      return visit % int(n) == int(n) - 1
    case ["not", wg] if wg[:2] == "wg" and wg[2:].isdigit():
      return warpgroup != int(wg[2:])
    case [wg] if wg[:2] == "wg" and wg[2:].isdigit():
      return warpgroup == int(wg[2:])
    case ["always"]:
      return True
    case ["never"]:
      return False
  raise ValueError(
    f"branches: {rule!r}, expected loop N, last of N, wgN, not wgN, always or "
    'never, joined by " or "'
  )


def conditional_branches(program: Sequence[Instruction]) -> list[int]:
  """Indices of the branches that need a rule, in the order of the code."""
  return [
    i
    for i, x in enumerate(program)
    if x.base == "BRA" and x.predicate and not _is_spin(program, i)
  ]


def _is_spin(program, i):
  target = program[i].target
  for x in program[target : target + _SPIN]:
    if x.base == "NANOSLEEP":
      return True
    if x.base in ("BRA", "EXIT"):
      return False
  return False


def match_rules(
  program: Sequence[Instruction], rules: Sequence[str]
) -> dict[int, str]:
  """Rule of every conditional branch, by the index of the branch.

  Raises:
    UndecidedBranch: a branch without a rule, a rule without a branch, or a
      loop's rule at a forward branch or the other way round.
  """
  found = conditional_branches(program)
  for n, i in enumerate(found):
    backward = program[i].target <= i
    if n >= len(rules):
      reason = f"branch {n} has no rule"
    elif backward != rules[n].startswith("loop"):
      kind = "backward" if backward else "forward"
      reason = f"branch {n} goes {kind}, its rule {rules[n]!r} does not"
    else:
      continue
    raise UndecidedBranch(_listing(program, found, rules, n, reason))
  if len(rules) > len(found):
    reason = f"{len(rules)} rules for {len(found)} branches"
    raise UndecidedBranch(_listing(program, found, rules, len(found), reason))
  return dict(zip(found, rules, strict=True))


def _listing(program, found, rules, wrong, reason):
  """Branches beside their rules, and the code around the first wrong one."""
  lines = [reason, "branches of the code, in order, and their rules:"]
  for n in range(max(len(found), len(rules))):
    rule = repr(rules[n]) if n < len(rules) else "no rule"
    if n >= len(found):
      lines.append(f"   {'-':>3} {'no branch':66s} {rule}")
      continue
    i = found[n]
    x, mark = program[i], ">>" if n == wrong else "  "
    what = _guarded(program, i)
    lines.append(f"{mark} {n:>3} [{i}] {x.predicate:6s} {what:50s} {rule}")
  if wrong < len(found):
    i = found[wrong]
    target = program[i].target
    lines.append(f"around branch {wrong}, which goes to [{target}]:")
    for j in range(max(0, i - 14), min(len(program), i + 4)):
      lines.append(f"  {'>' if j == i else ' '} [{j}] {program[j]}")
    after = " | ".join(map(str, program[target : target + 3]))
    lines.append(f"  at its target: {after}")
  return "\n".join([*lines, _HELP])


def _guarded(program, i):
  """Number and kind of the instructions that a branch skips or repeats."""
  target = program[i].target
  backward = target <= i
  inside = program[target:i] if backward else program[i + 1 : target]
  counts = collections.Counter(x.base for x in inside)
  kind = "back over" if backward else "skips"
  return f"{kind} {len(inside)} instructions" + "".join(
    f", {counts[op]} {op}" for op in _SHOWN if counts[op]
  )


def trace(
  program: Sequence[Instruction],
  rules: Mapping[int, str],
  warpgroup: int,
  chunks: int = 1,
) -> list[int]:
  """Indices of the instructions that a warpgroup executes, in order.

  A predicated EXIT and a spin wait are passed.

  Raises:
    ValueError: the path does not come to an end.
  """
  i, path = 0, []
  visits: collections.Counter[int] = collections.Counter()
  while len(path) < _LIMIT and i < len(program):
    x = program[i]
    path.append(i)
    if x.base == "EXIT" and not x.predicate:
      return path
    jump = x.base == "BRA" and not x.predicate
    if i in rules:
      jump = is_taken(rules[i], warpgroup, visits[i], chunks)
      visits[i] += 1
    i = x.target if jump else i + 1
  raise ValueError(
    f"warpgroup {warpgroup}: no end after {len(path)} instructions; does a "
    "loop turn without a rule?"
  )
