#!/bin/sh
# Installs Chromium from the system's packages, unless there is a browser.
for name in chromium chromium-browser google-chrome; do
  command -v $name >/dev/null && exit 0
done
command -v apt-get >/dev/null || {
  echo "install_chromium: no browser and no apt-get; install Chromium" >&2
  exit 1
}
sudo=
test "$(id -u)" = 0 || sudo=sudo
# A stale index may still do.
$sudo apt-get update -qq || true
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq \
  --no-install-recommends chromium
