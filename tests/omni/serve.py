"""`vllm serve --omni` on a CPU: `python -m tests.omni.serve serve MODEL --omni ...`."""

from tests.omni.cpu import prepare

if __name__ == "__main__":
    operators = prepare()
    from vllm_omni.entrypoints.cli.main import main

    main()
