"""The former place of [`hf_mtp.cli.regenerate`], for scripts that launch `-m hf_mtp.regenerate`."""

from .cli.regenerate import main

if __name__ == "__main__":
    main()
