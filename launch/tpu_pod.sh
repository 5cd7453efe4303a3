#!/usr/bin/env bash
# A TPU VM slice from the queue to the last step of a run; docs/launching.md explains it.
#
#   launch/tpu_pod.sh create --name=psec --zone=us-west4-a --type=v5litepod-16 --spot
#   launch/tpu_pod.sh setup  --name=psec --zone=us-west4-a --bucket=my-bucket
#   launch/tpu_pod.sh run    --name=psec --zone=us-west4-a -- launch.pretrain \
#       --config=experiments/configs/dmc_walker.py:paper --distributed \
#       --mesh=data:16 --workdir=/mnt/bucket/stand --library=/mnt/bucket/library
#   launch/tpu_pod.sh watch  --name=psec --zone=us-west4-a
#   launch/tpu_pod.sh stop   --name=psec --zone=us-west4-a
#   launch/tpu_pod.sh resume --name=psec --zone=us-west4-a --type=v5litepod-16 --spot \
#       --bucket=my-bucket -- launch.pretrain ...as before...
#   launch/tpu_pod.sh delete --name=psec --zone=us-west4-a
#
# create queues the slice; setup waits for it, copies this checkout, installs it and
# mounts the bucket at /mnt/bucket on every worker; run starts one command on all of
# them; resume makes a slice that is gone anew, waits for one that is still queued, and
# starts the command again.
#
#   --name=NAME --zone=ZONE     of the slice; always needed
#   --type=TYPE                 such as v5litepod-16, v6e-8, v4-32 (create, resume)
#   --runtime=VERSION           software of the VMs; default by type (create, resume)
#   --spot                      cheaper, may be preempted (create, resume)
#   --bucket=BUCKET             with hierarchical namespace (setup, resume)
#   --project=PROJECT           default gcloud's
#   --dry_run                   print the commands and run none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly MOUNT=/mnt/bucket

fail() {
  echo "error: $*" >&2
  exit 2
}

# Words as a shell would take them back, quoted where that is needed.
quoted() {
  local word line=''
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+=" $word"
  done
  echo "${line# }"
}

# Every command is shown before it runs.
do_it() {
  echo "+ $(quoted "$@")"
  if [[ -z $dry_run ]]; then "$@"; fi
}

slice() {
  do_it gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"
}

on_workers() {
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" \
    --command="$2"
}

state() {
  "${describe[@]}"
}

# The state, or NOT_FOUND; any other failure of gcloud ends the script.
state_if_any() {
  local errors now=''
  errors=$(mktemp)
  if ! now=$(state 2>"$errors") && grep -q NOT_FOUND "$errors"; then now=NOT_FOUND; fi
  if [[ -z $now ]]; then cat "$errors" >&2; fi
  rm "$errors"
  [[ -n $now ]] || fail "slice $name: its state is not known"
  echo "$now"
}

# Before anything is deleted for a slice that could not be made.
choose_runtime() {
  [[ -n $type ]] || fail "$verb needs --type, such as --type=v5litepod-16"
  if [[ -z $runtime ]]; then
    case $type in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
      *) fail "--type=$type: give its software too, with --runtime=VERSION" ;;
    esac
  fi
}

create() {
  choose_runtime
  # The scope lets the workers write to the bucket.
  slice create --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" --scopes=cloud-platform ${spot:+--spot}
}

# Until the slice is there; the queue may take hours.
await() {
  local now
  echo "+ until: $(quoted "${describe[@]}") is ACTIVE"
  if [[ -n $dry_run ]]; then return; fi
  while true; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING) fail "slice $name is $now" ;;
    esac
    echo "$(date -u +%H:%M:%S) $now"
    sleep 60
  done
}

setup() {
  local archive=/tmp/psec_jax-XXXXXX.tgz
  if [[ -z $dry_run ]]; then archive=$(mktemp --suffix=.tgz -t psec_jax-XXXXXX); fi
  await
  # What git tracks, with changes that are not committed; no other file of the checkout.
  do_it bash -c "git ls-files -z --cached -- \
':!results' | tar --null --files-from=- -czf $(quoted "$archive")"
  do_it gcloud compute tpus tpu-vm scp "$archive" "$name:psec_jax.tgz" \
    "${where[@]}" --worker=all
  if [[ -z $dry_run ]]; then rm -f "$archive"; fi
  on_workers all 'mkdir -p psec_jax && tar -xzf psec_jax.tgz -C psec_jax'
  # The VMs' own Python is older than what JAX needs.
  on_workers all 'cd psec_jax && python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --allow-existing --python=3.11 .venv && ~/.local/bin/uv pip install --quiet -r requirements.txt -e ".[tpu]"'
  on_workers all 'cd psec_jax && .venv/bin/python -c "import jax; jax.distributed.initialize(); print(jax.process_index(), jax.local_device_count(), jax.device_count())"'
  if [[ -n $bucket ]]; then
    # shellcheck disable=SC2016 # expanded on the workers
    on_workers all 'echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list && curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null && sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse'
    # Without cached metadata a worker sees at once what another one wrote.
    on_workers all "sudo mkdir -p $MOUNT && sudo chown \$(id -u) $MOUNT && (mountpoint -q $MOUNT || gcsfuse --metadata-cache-ttl-secs=0 $(quoted "$bucket") $MOUNT)"
  fi
}

run() {
  local argument kept=0 line="cd psec_jax"
  for argument in "${command[@]}"; do
    case $argument in
      --workdir="$MOUNT"/?* | --library="$MOUNT"/?*) kept=$((kept + 1)) ;;
      --workdir=* | --library=* | *=gs://*)
        fail "$argument: expected a folder in $MOUNT, where setup mounts the bucket"
        ;;
    esac
  done
  [[ $kept -eq 2 ]] || fail "$verb needs -- launch.COMMAND --workdir=$MOUNT/... " \
    "--library=$MOUNT/...: what is elsewhere is lost with the slice"
  line+=" && if ! mountpoint -q $MOUNT; then echo '$MOUNT is not mounted: setup' >&2;"
  line+=" elif pkill -0 -F run.pid 2>/dev/null; then echo 'a run is going here' >&2;"
  line+=" else nohup .venv/bin/python -m $(quoted "${command[@]}") >>run.log 2>&1"
  line+=" </dev/null & echo \$! >run.pid; exit; fi; exit 1"
  on_workers all "$line"
}

watch() {
  slice describe --format='value(state.state)'
  on_workers 0 'tail -n 50 -F psec_jax/run.log'
}

# SIGTERM: the run saves and exits with code 143.
stop() {
  on_workers all 'pkill -TERM -F psec_jax/run.pid'
}

delete() {
  # With --force the VMs go too.
  slice delete --force --quiet
}

resume() {
  local now=SUSPENDED  # a dry run shows the most that there may be to do
  echo "+ $(quoted "${describe[@]}")"
  if [[ -z $dry_run ]]; then now=$(state_if_any); fi
  case $now in
    ACTIVE) ;;
    FAILED | SUSPENDED | SUSPENDING)
      choose_runtime
      delete
      create
      setup
      ;;
    NOT_FOUND)
      create
      setup
      ;;
    DELETING) fail "slice $name is DELETING; resume when it is gone" ;;
    *) setup ;;  # queued: a new one would lose its place
  esac
  run
}

name='' zone='' type='' runtime='' spot='' bucket='' project='' dry_run=''
command=()
verb=${1:-}
case $verb in
  create | setup | run | watch | stop | resume | delete) shift ;;
  *) fail "got '${verb}', expected create, setup, run, watch, stop, resume or delete" ;;
esac
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --runtime=?*) runtime=${1#*=} ;;
    --bucket=?*) bucket=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --spot) spot=yes ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      command=("$@")
      break
      ;;
    *) fail "got '$1', expected one of the options at the head of launch/tpu_pod.sh" ;;
  esac
  shift
done
[[ -n $name ]] || fail "$verb needs --name=NAME"
[[ -n $zone ]] || fail "$verb needs --zone=ZONE"
[[ -n $dry_run ]] || command -v gcloud >/dev/null || fail "there is no gcloud here"
bucket=${bucket#gs://}
where=(--zone="$zone" ${project:+--project="$project"})
describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
  '--format=value(state.state)')
"$verb"
