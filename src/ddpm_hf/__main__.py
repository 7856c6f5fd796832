"""python -m ddpm_hf COMMAND ..., the same as ddpm-hf COMMAND ..."""

from ddpm_hf.cli import main

if __name__ == "__main__":
    main()
