"""``python -m llmpack``."""

from llmpack.cli.main import main

if __name__ == "__main__":
    main()
