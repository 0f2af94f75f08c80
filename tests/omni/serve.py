"""`vllm serve --omni`, on a CPU too: `python -m tests.omni.serve serve MODEL --omni ...`."""

from tests.omni.prepare import prepare

if __name__ == "__main__":
    operators = prepare()
    from vllm_omni.entrypoints.cli.main import main

    main()
