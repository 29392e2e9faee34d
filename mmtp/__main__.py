"""``python -m mmtp`` is ``mmtp``."""

from mmtp.cli import main

if __name__ == "__main__":
    main()
