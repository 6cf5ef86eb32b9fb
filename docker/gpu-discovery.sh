#!/bin/sh
# Prints the GPUs of this machine as Spark's ResourceInformation; an empty list if there are none.
set -u

if gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null); then
    addresses=$(printf '%s\n' "$gpus" | sed -n 's/^ *\([0-9][0-9]*\) *$/"\1"/p' | paste -s -d , -)
else
    addresses=
fi
printf '{"name": "gpu", "addresses": [%s]}\n' "$addresses"
