#!/usr/bin/env bash
# Joins the Ray cluster at $RAY_HEAD and then runs a Prefect worker. A flow's driver has to stand on a Ray node (Ray Train
# and Ray Data do not work well through Ray's remote client), so the worker's container is one, with nothing to give.
set -euo pipefail

ray start --address="$RAY_HEAD" --num-cpus=0 --num-gpus=0
exec prefect worker start --pool face-diffuser --type process --with-healthcheck
