"""Inert stand-in for the os module: enough for the standard library to import, and nothing that reaches the host."""
import abc as _abc
import sys as _sys
import posixpath as path
from posixpath import curdir, pardir, sep, pathsep, defpath, extsep, altsep, devnull

_sys.modules['os.path'] = path
name = 'posix'
linesep = '\n'
environ = {}
environb = {}
supports_bytes_environ = True
supports_fd = set()
supports_dir_fd = set()
supports_effective_ids = set()
supports_follow_symlinks = set()
error = OSError
SEEK_SET, SEEK_CUR, SEEK_END = 0, 1, 2
F_OK, X_OK, W_OK, R_OK = 0, 1, 2, 4
O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_APPEND = 0, 1, 2, 64, 128, 512, 1024


class stat_result(tuple):
    pass


class terminal_size(tuple):
    pass


def getenv(key, default=None):
    return environ.get(key, default)


def putenv(key, value):
    pass


def getcwd():
    return '/'


def getpid():
    return 1


def cpu_count():
    return 1


def process_cpu_count():
    return 1


def urandom(n):
    import _random
    return _random.Random().getrandbits(8 * n).to_bytes(n, 'little') if n else b''


def getrandom(n, flags=0):
    return urandom(n)


def fsencode(s):
    return s.encode('utf-8', 'surrogateescape') if isinstance(s, str) else s


def fsdecode(s):
    return s.decode('utf-8', 'surrogateescape') if isinstance(s, bytes) else s


def fspath(p):
    if isinstance(p, (str, bytes)):
        return p
    try:
        return type(p).__fspath__(p)
    except AttributeError:
        raise TypeError('expected str, bytes or os.PathLike object, not ' + type(p).__name__) from None


class PathLike(_abc.ABC):
    __slots__ = ()

    @_abc.abstractmethod
    def __fspath__(self):
        raise NotImplementedError

    @classmethod
    def __subclasshook__(cls, sub):
        return True if any('__fspath__' in b.__dict__ for b in sub.__mro__) else NotImplemented


def _deny(*args, **kwargs):
    raise PermissionError(1, 'Operation not permitted')


for _n in ('open close read write stat lstat fstat listdir scandir mkdir makedirs rmdir remove unlink rename replace system '
           'popen fork kill execv execve waitpid pipe dup dup2 chdir chmod access symlink readlink link utime isatty lseek '
           'truncate ftruncate fsync get_terminal_size getuid getgid walk').split():
    globals()[_n] = _deny


def register_at_fork(**kwargs):
    pass


def strerror(n):
    return 'Error %d' % n
