#!/usr/bin/env bash
# One job on one or more hosts with torchrun. Run the same line on every host:
#
#   launch/torchrun.sh RECIPE.py --preset NAME [--section.key value ...]
#
# NODES (1), NPROC (ranks of each host: its GPUs, or 1), HEAD (host:port that all hosts reach) and JOB (a name that
# all hosts share) come from the environment. With one host no HEAD is needed.
set -euo pipefail

NODES=${NODES:-1}
NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}

if [ "$NODES" = 1 ]; then
    exec torchrun --standalone --nproc-per-node "$NPROC" "$@"
fi
exec torchrun --nnodes "$NODES" --nproc-per-node "$NPROC" --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:?set HEAD to host:port of one host, reachable from all}" --rdzv-id "${JOB:-dltrain}" "$@"
