#!/usr/bin/env bash
# Everything about the video model that needs a GPU, in 6 minutes on one H100: a trace, calibration, and the evaluation.
#
#     bash benchmarks/quality/video/on_device.sh FOLDER [further arguments of each command, as --frames 2 --size 16]
#
# Each part has its time and the others go on without it; results are written as they come.
set -u
out=$1
shift
mkdir -p "$out"
run() {
    local seconds=$1 name=$2
    shift 2
    timeout "$seconds" python3 -m "benchmarks.quality.video.$name" "$@" >"$out/$name.log" 2>&1
    echo "$name: exit status $?"
    tr '\r' '\n' <"$out/$name.log" | grep -v '^kept in\|[0-9]%|\|^$' | tail -n 60
}
run 30 trace --threshold -8 --rule mass --out "$out/video.trace" "$@"
run 75 calibrate --videos 2 --steps 20 --out "$out" "$@"
run 255 evaluate --videos 2 --minutes 3.9 --out "$out" --pictures "$out" "$@" --methods \
    product-dense product-running-max:-8,-6,-5,-4,-3,-2 product-mass:-11,-10,-9,-8,-7,-6,-5,-4,-2 \
    product-mass-refresh-8:-8,-7,-6 running-max-176:-8,-6,-4,-2,-1 mass-variance:-9,-8,-7
