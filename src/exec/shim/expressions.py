# Gaps of RustPython 0.5.0 in regular expressions, mended before the library compiles its own: a search by a literal prefix
# that runs into a group goes wrong, a lone group that took no part is None where it should be empty text, and defaults have a
# name.
import re, sys
import re._compiler
def literal_prefix(pattern, flags, plain=re._compiler._get_literal_prefix):
    prefix, skip, whole = plain(pattern, flags)
    if skip is not None and 0 < skip < len(prefix):
        prefix, whole = prefix[:skip], False
    return prefix, skip, whole
re._compiler._get_literal_prefix = literal_prefix
re.purge()
def findall(self, string, pos=0, endpos=sys.maxsize, plain=re.Pattern.findall):
    found = plain(self, string, pos, endpos)
    if self.groups == 1 and None in found:
        empty = string[:0]
        found = [empty if part is None else part for part in found]
    return found
pattern = re.Pattern
match = re.Match
def groups(self, default=None, plain=re.Match.groups):
    return plain(self, default)
def groupdict(self, default=None, plain=re.Match.groupdict):
    return plain(self, default)
