"""Make the environment that runs this one that may be copied and moved, with the checkout around it: `make setup`.

    .venv/bin/python scripts/relocatable.py

venv and pip write absolute paths, by which a copy would run the programs and the source of the checkout it was made
from. What they have written once is left as it is, so running this again changes nothing.
"""

import os
import re
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(os.path.abspath(__file__)).parent.parent / "src"
# An environment that several checkouts share runs the source of the one that it is started in.
HERE = 'import os, sys; os.path.exists("src/roads/__init__.py") and sys.path.append(os.path.abspath("src"))'
# The absolute path stands in the lines before. A shell that cannot tell which file it is reading, as sh mostly, takes
# that; once it is gone, the environment of that name in the folder where it is.
ACTIVATE = {
    "activate": ('_OLD_VIRTUAL_PATH="$PATH"\n', """\
if _here="$(realpath -- "${BASH_SOURCE:-${ZSH_VERSION:+$(eval 'print -r -- "${(%):-%x}"')}}" 2>/dev/null)" ; then
    VIRTUAL_ENV="$(dirname -- "$(dirname -- "$_here")")"
elif [ ! -e "$VIRTUAL_ENV/bin/activate" ] && [ -e "${VIRTUAL_ENV##*/}/bin/activate" ] ; then
    VIRTUAL_ENV="$PWD/${VIRTUAL_ENV##*/}"
fi
unset _here
"""),
    "activate.fish": ("set -gx _OLD_VIRTUAL_PATH $PATH\n", """\
if test -f (status filename)
    set -gx VIRTUAL_ENV (dirname (dirname (realpath (status filename))))
end
"""),
}
BESIDE = b"""#!/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0")")"/python "$0" "$@"
' '''
"""


def main() -> None:
    programs = Path(sys.prefix, "bin")
    packages = Path(sysconfig.get_path("purelib"))
    (packages / "roads.pth").write_text(f"{HERE}\n{os.path.relpath(SOURCE, packages)}\n", encoding="utf-8")

    for name, (line, before) in ACTIVATE.items():
        text = (programs / name).read_text(encoding="utf-8")
        if before not in text:
            (programs / name).write_text(text.replace(line, before + line), encoding="utf-8")
    (programs / "activate.csh").unlink(missing_ok=True)  # csh never can tell

    python = re.escape(bytes(programs / "python")) + rb"[\d.]*"
    # The second is what pip writes where the path is long or has a space in it.
    absolute = re.compile(rb'#!%b\n|#!/bin/sh\n\'\'\'exec\' "?%b"? "\$0" "\$@"\n\' \'\'\'\n' % (python, python))
    for path in programs.iterdir():
        if path.is_file() and not path.is_symlink() and (first := absolute.match(content := path.read_bytes())):
            path.write_bytes(BESIDE + content[first.end():])


if __name__ == "__main__":
    main()
