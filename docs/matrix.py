"""Writes docs/forms.md's table of combinations from the kernels that exist; ``--check`` says whether it is true."""

import re
import sys
from pathlib import Path

from fusedopt.forms import matrix

PAGE = Path(__file__).parent / "forms.md"


def main() -> int:
    text = PAGE.read_text()
    new = re.sub(
        r"(<!-- matrix:begin -->\n).*?(<!-- matrix:end -->)",
        lambda m: m[1] + "\n" + matrix() + "\n" + m[2],
        text,
        flags=re.DOTALL,
    )
    if "--check" in sys.argv:
        print("up to date" if new == text else f"{PAGE} is not up to date: python docs/matrix.py", file=sys.stderr)
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
