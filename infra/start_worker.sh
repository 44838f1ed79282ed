#!/usr/bin/env bash
# Joins the Ray cluster at $RAY_HEAD and then runs a Prefect worker, whose runs are the cluster's drivers.
set -euo pipefail

exec "$(dirname "$0")/on_ray_node.sh" prefect worker start --pool face-diffuser --type process --with-healthcheck
