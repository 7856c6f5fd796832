"""Draw samples from a saved pipeline and save them as one sheet of images.

python training/sample.py runs/digits/pipeline --count 64 --out samples.png
python training/sample.py runs/digits/pipeline --count 8 --progressive 12 --out progressive.png
python training/sample.py runs/digits/pipeline --count 8 --interpolate 500 --data digits --out interpolation.png
python training/sample.py runs/mnist-8-32/pipeline --count 16 --data mnist --out larger.png    # for an upsampler
"""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]], "sample.py")
