"""`python -m onebase_server` is `onebase serve`."""

import sys

from onebase_server.app.cli import serve

if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
