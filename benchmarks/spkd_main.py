"""The command line as a script: what torchrun starts in each rank."""

from spkd.cli import main

main()
