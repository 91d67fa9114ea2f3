"""Inert stand-in for the posix module: the one function that posixpath wants of it."""


def _path_splitroot_ex(p):
    empty, slash = (b'', b'/') if isinstance(p, bytes) else ('', '/')
    if p[:1] != slash:
        return empty, empty, p
    if p[1:2] != slash or p[2:3] == slash:
        return empty, slash, p[1:]
    return empty, p[:2], p[2:]
