#!/bin/sh
# Prints a Python >= 3.12, or one line that says there is none.
# Looks at $PYTHON, the PATH, uv and pyenv, in this order.
ok() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}
for name in $PYTHON python3.12 python3.13 python3.14 python3 python; do
  path=$(command -v "$name" 2>/dev/null) || continue
  if ok "$path"; then echo "$path"; exit 0; fi
done
if command -v uv >/dev/null 2>&1; then
  path=$(uv python find '>=3.12' 2>/dev/null)
  if [ -n "$path" ] && ok "$path"; then echo "$path"; exit 0; fi
fi
root=${PYENV_ROOT:-$HOME/.pyenv}
for path in "$root"/versions/3.1[2-9]*/bin/python; do
  if [ -x "$path" ] && ok "$path"; then echo "$path"; exit 0; fi
done
echo "gdn2_jax needs Python >= 3.12 and found none on the PATH, in uv or in" \
  "pyenv. Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
