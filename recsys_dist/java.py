"""Is there a Java that Spark can run on? Checked before Spark is started, by make and by every Spark job.

python recsys_dist/java.py

Imports the standard library alone: make runs it before anything is installed.
"""

import os
import re
import shutil
import subprocess
import sys

OLDEST = 17


def problem() -> str | None:
    """Say what is wrong with this machine's Java, or None where Spark can start.

    Looks where Spark's own scripts look: `$JAVA_HOME/bin/java`, else `java` on PATH.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(os.path.join(home, "bin", "java") if home else "java")  # noqa: PTH118
    where = f"JAVA_HOME={home}" if home else "PATH"
    todo = (
        f"Install Java {OLDEST} or newer (Debian: openjdk-{OLDEST}-jre-headless) or point JAVA_HOME at one."
    )
    if java is None:
        return f"No Java was found ({where}), and Spark runs on Java {OLDEST} or newer. {todo}"
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    if version is None:
        return f"{java} -version printed no version: {(said.stderr + said.stdout).strip()[:200]!r}. {todo}"
    if int(version[1]) < OLDEST:
        return f"{java} is Java {version[1]}, and Spark runs on Java {OLDEST} or newer. {todo}"
    return None


if __name__ == "__main__":
    found = problem()
    if found:
        print(f"error: {found}", file=sys.stderr)
        sys.exit(64)
