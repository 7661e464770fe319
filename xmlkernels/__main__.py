"""`python -m xmlkernels COMMAND …`, and `torchrun -m xmlkernels train …`."""

from xmlkernels.cli.main import main

if __name__ == "__main__":
    main()
