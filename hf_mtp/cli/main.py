"""The command `hf-mtp`. It imports nothing before Ctrl-C ends it without a traceback."""


def main() -> None:
    """Runs the command. Ctrl-C ends it with exit code 130, also while it still imports the verbs."""
    try:
        from .app import app

        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
