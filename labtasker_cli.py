"""What pip's console scripts import, and the home of the comforts of a terminal that work can do without.

`labtasker` and `lt` start `main`, `labtasker-server` starts `server_main`. Everything that work needs is in
labtasker.py; commands that stand here enter themselves into its table `COMMANDS`.
"""
from labtasker import main

server_main = main  # `labtasker-server serve` is `labtasker serve`

__all__ = ["main", "server_main"]
