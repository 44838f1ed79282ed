#!/usr/bin/env bash
# usage: infra/on_ray_node.sh COMMAND...
# Joins the Ray cluster at $RAY_HEAD and then becomes the command. A flow's driver has to stand on a Ray node (Ray Train and
# Ray Data do not work well through Ray's remote client), so the container is one, with nothing to give.
set -euo pipefail

ray start --address="$RAY_HEAD" --num-cpus=0 --num-gpus=0
exec "$@"
