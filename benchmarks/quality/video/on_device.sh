#!/usr/bin/env bash
# Everything about the video model that needs a GPU, in 5 minutes on two H100s: the evaluation of the product and of what
# issue 6 asks to be compared with it, other ways to skip at two lengths, a trace, and calibration.
#
#     bash benchmarks/quality/video/on_device.sh FOLDER [SECONDS [further arguments of each command, as --frames 2]]
#
# In the folder are then the results, video.trace, and details.tar.gz with logs and pictures. Results are written as they
# come, and what is most wanted comes first: what time is too short for is missing, at its end. Only the first GPU is timed.
set -u
out=$1
seconds=${2:-300}
shift $(($# < 2 ? $# : 2))
more=("$@")
details=$(mktemp -d)
end=$((SECONDS + seconds - 15))
mkdir -p "$out"

# GPU SECONDS NAME COMMAND [arguments]: within its seconds and what is left of all.
run() {
    local gpu=$1 limit=$(($2 < end - SECONDS ? $2 : end - SECONDS)) name=$3 command=$4
    shift 4
    if ((limit < 20)); then
        echo "$name: no time is left"
        return
    fi
    # 16 seconds for imports, kernels and the model: what is left is for videos.
    [[ $command != evaluate ]] || set -- --name "$name" --pictures "$details" --minutes "$(((limit - 16) * 10 / 6))e-2" "$@"
    CUDA_VISIBLE_DEVICES=$gpu timeout "$limit" python3 -m "benchmarks.quality.video.$command" "$@" "${more[@]}" \
        >"$details/$name.log" 2>&1
    echo "$name: exit status $?, $SECONDS s after the start"
}

{
    run 0 290 video_quality evaluate --out "$out" --videos 2 --steps 25 --methods \
        product-dense product-mass:-10,-9,-8.6,-8,-7.6,-7,-6.6,-6,-5,-4,-2 product-running-max:-10,-8,-6,-4,-3,-2,-1 \
        product-mass-refresh-8:-8,-7,-6 product-mass-warmup:-8,-7 \
        running-max-176:-5,-4,-3,-2,-1 mass-variance:-8.5,-8,-7,-6 mass-bend:-8.5,-8,-7,-6
    run 0 360 video_quality_summaries evaluate --out "$out" --videos 2 --steps 25 --methods \
        product-mass:-9,-8,-7 mass-variance-32:-9,-8,-7 mass-mean:-8.5,-7.5,-6.5 mass-variance-refresh-16:-6.5
} &
{
    run 1 30 trace trace --threshold -8 --rule mass --steps 24 --out "$out/video.trace"
    run 1 110 video_calibration calibrate --videos 2 --steps 20 --out "$out"
    run 1 360 video_quality_tries_8 evaluate --out "$out" --videos 2 --steps 25 --frames 8 --methods \
        product-dense product-mass:-10,-9,-8.6,-8,-7.6,-7,-6.6,-6,-5.6,-5 product-running-max:-6,-4,-3,-2,-1 \
        budget:-6,-5,-4,-3 budget-binned:-5,-4,-3 running-max-176:-4,-3,-2,-1 running-max-heaviest:-7,-6,-5,-4 \
        in-pass:-7,-5,-3,-2 in-pass-heaviest:-9,-7,-6,-5 mass-in-pass-3:-8,-7,-6 mass-rotating-8:-7,-6,-5 \
        product-mass-refresh-8:-7,-6,-5 budget-worst-row:-4,-3,-2,-1 mass-in-pass:-8,-7 mass-in-pass-3-heaviest:-7,-6
} &
run 1 360 video_quality_tries evaluate --out "$out" --videos 2 --steps 25 --methods \
    product-mass:-9,-8,-7.6,-7,-6.6,-6 budget:-5,-4,-3 budget-binned:-4 running-max-heaviest:-6,-5 \
    in-pass-heaviest:-8,-6 mass-in-pass-3:-8,-7 mass-rotating-8:-7,-6 budget-worst-row:-3,-2 in-pass:-4 &
wait

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
