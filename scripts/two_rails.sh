#!/usr/bin/env bash
# Two processes in network namespaces of their own, joined by two links of equal, limited rate: one
# transfer over either, over both, and over both while one goes down. Root only; arguments go to
# experiments/two_rails.py, such as --json=results/two_rails.json.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "error: network namespaces want root" >&2; exit 2; }
python=${PYTHON:-.venv/bin/python}
rate=${RATE_MBIT:-400}
folder=$(mktemp -d)
near=rails-near far=rails-far
server=
cleanup() {
  [ -n "$server" ] && kill "$server" 2>/dev/null || true
  ip netns del $near 2>/dev/null || true
  ip netns del $far 2>/dev/null || true
  rm -rf "$folder"
}
trap cleanup EXIT
ip netns add $near
ip netns add $far
for space in $near $far; do ip -n $space link set lo up; done
for link in 0 1; do
  ip link add near$link netns $near type veth peer name far$link netns $far
  for side in near far; do
    space=rails-$side
    host=$([ $side = near ] && echo 1 || echo 2)
    ip -n $space addr add 10.77.$link.$host/24 dev $side$link
    ip -n $space link set $side$link up
    tc -n $space qdisc add dev $side$link root tbf rate "${rate}mbit" burst 256kb latency 100ms
  done
done
export JAX_PLATFORMS=cpu NPROC=16
ip netns exec $far "$python" -m experiments.two_rails --role=serve --meeting="$folder" \
  --addresses=10.77.0.2,10.77.1.2 "$@" &
server=$!
ip netns exec $near "$python" -m experiments.two_rails --role=pull --meeting="$folder" \
  --addresses=10.77.0.1,10.77.1.1 --mbit="$rate" --down="ip link set near1 down" "$@"
wait "$server"
server=
