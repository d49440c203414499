#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00
#SBATCH --signal=USR1@120 --requeue --open-mode=append
#
# Train on a SLURM cluster:  sbatch dev/slurm.sh     (from the root of the repository, once)
#
# SLURM sends USR1 two minutes before the time is up. train.py then saves a checkpoint and leaves
# with code 0, and this script queues itself again until the run is finished ($RUN/finished is there).
# A run that fails is not queued again. Set the files and the number of nodes to yours.

RUN=runs/mine
export RUN MASTER_PORT=29500
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

# One process a GPU. train.py reads the same three variables that torchrun sets.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python train.py --preset paper --data bags --out "$RUN" \
        --vision uni/pytorch_model.bin --text quiltnet/open_clip_pytorch_model.bin \
        --tokenizer bpe_simple_vocab_16e6.txt.gz' || exit 1

[ -e "$RUN/finished" ] || scontrol requeue "$SLURM_JOB_ID"
