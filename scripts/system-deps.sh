#!/usr/bin/env bash
# System packages that the tests use beyond what pip brings: a browser (the demo page is looked at as a picture) and make.
# Debian and Ubuntu. Does nothing where all is there already.
set -euo pipefail

missing=()
command -v make >/dev/null || missing+=(make)
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
  || missing+=(chromium fonts-dejavu-core)
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)

if [ ${#missing[@]} -eq 0 ]; then
  echo "system packages: nothing to install"
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "please install by hand: ${missing[*]}" >&2
  exit 1
fi
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
