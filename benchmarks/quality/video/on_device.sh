#!/usr/bin/env bash
# Everything about the video model that needs a GPU, most wanted first: the product's curves and what issue 6 has them
# compared with (4 minutes on an H100), a trace, calibration, and other ways to skip at two lengths (15 minutes more).
#
#     bash benchmarks/quality/video/on_device.sh FOLDER [SECONDS [further arguments of each command, as --frames 2]]
#
# In the folder are then the results, video.trace, and details.tar.gz with logs and pictures. Results are written as they
# come: what time is too short for is missing, at the end.
set -u
out=$1
end=$((SECONDS + ${2:-1200} - 10))
shift $(($# < 2 ? $# : 2))
more=("$@")
details=$(mktemp -d)
mkdir -p "$out"

# NAME COMMAND [arguments]: within what is left of the time.
run() {
    local name=$1 command=$2 limit=$((end - SECONDS))
    shift 2
    if ((limit < 20)); then
        echo "$name: no time is left"
        return
    fi
    timeout "$limit" python3 -m "benchmarks.quality.video.$command" "$@" "${more[@]}" >"$details/$name.log" 2>&1
    echo "$name: exit status $?, $SECONDS s after the start"
}

evaluate=(evaluate --out "$out" --pictures "$details" --videos 2 --steps 25 --minutes 1000)
run video_quality "${evaluate[@]}" --methods product-dense \
    product-mass-rising-4-warmup-5:-10.5,-10,-9.5,-9,-8.5,-8,-7.75,-7.5 product-mass-rising-4:-10,-9.5,-9,-8.5,-8,-7.75,-7.5 \
    product-mass-rising-6:-10.5,-10,-9.5,-9,-8.5,-8 product-mass-rising-2:-9,-8.5,-8,-7.5,-7 \
    product-mass-summaries-rising-4:-11,-10,-9.5,-9,-8.5,-8,-7.75 product-running-max-rising-4:-6,-5,-4,-3 \
    product-mass-summaries:-8,-7.5 product-running-max:-6,-5,-7 product-mass:-9,-8.5,-8 \
    product-mass-warmup:-8,-7.5,-7,-6.75,-6.5 product-mass-summaries:-8.5,-7,-9,-10,-6,-4,-2 \
    product-mass:-7,-10,-7.5,-6,-4,-2 product-running-max:-4,-2 running-max-176:-6,-5,-7,-4,-8 mass-bend:-8,-7
run trace trace --threshold -8 --rule mass --steps 24 --out "$out/video.trace"
run video_calibration calibrate --videos 2 --steps 20 --out "$out"
run video_quality_tries_8 "${evaluate[@]}" --name video_quality_tries_8 --frames 8 --methods \
    product-dense product-mass:-10,-9,-8.6,-8,-7.6,-7,-6.6,-6,-5.6,-5 product-running-max:-6,-4,-3,-2,-1 \
    budget:-6,-5,-4,-3 budget-binned:-5,-4,-3 running-max-176:-4,-3,-2,-1 running-max-heaviest:-7,-6,-5,-4 \
    in-pass:-7,-5,-3,-2 in-pass-heaviest:-9,-7,-6,-5 mass-in-pass-3:-8,-7,-6 mass-rotating-8:-7,-6,-5 \
    product-mass-refresh-8:-7,-6,-5 budget-worst-row:-4,-3,-2,-1
run video_quality_tries "${evaluate[@]}" --name video_quality_tries --methods \
    product-mass:-10,-9,-8.6,-8,-7.6,-7,-6.6,-6,-5 product-running-max:-8,-6,-4,-3,-2,-1 running-max-176:-5,-3,-1 \
    product-mass-warmup:-8,-7 budget:-5,-4,-3 budget-binned:-4 running-max-heaviest:-6,-5 \
    in-pass-heaviest:-8,-6 mass-in-pass-3:-8,-7 mass-rotating-8:-7,-6 budget-worst-row:-3,-2 \
    product-mass-refresh-8:-8,-7,-6 mass-variance:-8.5,-8,-7 mass-variance-32:-9,-8,-7 mass-mean:-8.5,-7.5

tar czf "$out/details.tar.gz" -C "$details" .
tail -n 3 "$details"/*.log | tr '\r' '\n' | grep -v '[0-9]%|\|^$'
timeout 15 python3 - "$out"/video_quality*.json <<'END'
import json
import sys
from pathlib import Path

from benchmarks.quality.video.evaluate import print_table

for path in map(Path, sys.argv[1:]):
    result = json.loads(path.read_text())
    print(f"\n{path.stem}, {result['setup']['videos']} videos\n")
    print_table(result["rows"])
END
