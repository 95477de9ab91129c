#!/bin/sh
# Certificates for the service `coordinator`, a key for each of the members a, b and c, and members.toml with them.
set -eu
cd "$(dirname "$0")"

allmend pki init coordinator
echo "[members]" >members.toml
for name in a b c; do
  line=$(allmend member key --out "$name.key")
  echo "$name = \"$line\"" >>members.toml
done
