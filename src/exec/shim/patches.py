# Gaps of RustPython 0.5.0. `fromkeys` is also called on instances; a str's width counts after the cut, and its characters are
# no bytes; floats without a type letter keep a digit behind the point, and exponents have no thousands; a bool is written as a
# number where there is a format, and rounded to one; what is stripped or swapped may lie beyond ASCII; tabs may have no width;
# a dict's order can be turned after a deletion; what is inserted by its key is itself; `r` has a name; what is removed is not
# returned. And how a set that gives its members in another order takes one off, and what makes clocks stand still.
import bisect, collections, itertools
def insort_right(a, x, lo=0, hi=None, *, key=None, plain=bisect.insort_right):
    hi = len(a) if hi is None else hi
    if key is None:
        return plain(a, x, lo, hi)
    a.insert(bisect.bisect_right(a, key(x), lo, hi, key=key), x)
def insort_left(a, x, lo=0, hi=None, *, key=None, plain=bisect.insort_left):
    hi = len(a) if hi is None else hi
    if key is None:
        return plain(a, x, lo, hi)
    a.insert(bisect.bisect_left(a, key(x), lo, hi, key=key), x)
bisect.insort = bisect.insort_right = insort_right
bisect.insort_left = insort_left
def permutations(iterable, r=None, plain=itertools.permutations):
    return plain(iterable, r)
itertools.permutations = permutations
deque = collections.deque
def remove(self, value, /, plain=collections.deque.remove):
    plain(self, value)
def round_bool(self, ndigits=None, /):
    return int(self).__round__() if ndigits is None else int(self).__round__(ndigits)
def fromkeys(cls, iterable, value=None, /):
    d = cls()
    for key in iterable:
        d[key] = value
    return d
ALIGN = ('<', '>', '^', '=')
def format_str(self, spec, /, plain=str.__format__):
    at = spec.find('.', 2 if spec[1:2] in ALIGN else 0)
    digits = spec[at + 1:].removesuffix('s')
    if at < 0 or not digits.isdigit():
        return plain(self, spec)
    return plain(self[:int(digits)], spec[:at])
def format_float(self, spec, /, plain=float.__format__):
    fill = spec[:1] if spec[1:2] in ALIGN else ''
    head, dot, digits = spec[len(fill):].partition('.')
    align = head[:1] if head[:1] in ALIGN else ''
    sign = head[len(align):len(align) + 1]
    sign = sign if sign in ('+', '-', ' ') else ''
    width = head[len(align) + len(sign):]
    text = plain(self, spec)
    if 'e' in text.lower() and (',' in width or '_' in width):
        return plain(self, fill + head.replace(',', '').replace('_', '') + dot + digits)
    if not digits.isdigit() or self - self != 0.0 or align == '=' or (width and (width[0] == '0' or not width.isdigit())):
        return text
    places = max(int(digits), 1)
    text = plain(self, '%s.%dg' % (sign, places))
    if 'e' not in text:
        mantissa, _, exponent = plain(self, '%s.%de' % (sign, places - 1)).partition('e')
        if int(exponent) == places - 1:
            text = (mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa) + 'e' + exponent
        elif '.' not in text:
            text += '.0'
    return text.__format__(fill + (align or '>') + width) if width else text
def format_int(self, spec, /, plain=int.__format__):
    return format_float(float(self), spec) if spec[-1:] in ('e', 'E', 'g', 'G') else plain(self, spec)
def zfill(self, width, /, plain=str.zfill):
    if self.isascii() or type(width) is not int:
        return plain(self, width)
    at = self[:1] in ('+', '-')
    return self[:at] + '0' * (width - len(self)) + self[at:]
def count(self, sub, /, *span, plain=str.count):
    if sub == '' and not self.isascii():
        self = 'x' * len(self)
    return plain(self, sub, *span)
def replace(self, old, new, /, count=-1, plain=str.replace):
    if old != '' or self.isascii() or type(new) is not str or type(count) is not int:
        return plain(self, old, new, count)
    if count < 0 or count > len(self):
        return new + ''.join([c + new for c in self])
    return ''.join([new + c for c in self[:count]]) + self[count:]
def format_bool(self, spec, /):
    return int(self).__format__(spec) if spec else str(self)
def stripping(plain):
    def strip(self, chars=None, /):
        if type(chars) is str and self.isascii() and not chars.isascii():
            chars = ''.join([c for c in chars if c.isascii()])
            return plain(self, chars) if chars else self
        return plain(self, chars)
    return strip
strip, lstrip, rstrip = stripping(str.strip), stripping(str.lstrip), stripping(str.rstrip)
def swapcase(self, /, plain=str.swapcase):
    return plain(self) if self.isascii() else ''.join([c.lower() if c.isupper() else c.upper() for c in self])
def expandtabs(self, tabsize=8, plain=str.expandtabs):
    return self.replace('\t', '') if isinstance(tabsize, int) and tabsize < 1 else plain(self, tabsize)
def reversed_dict(self, /):
    return iter(list(self)[::-1])
def stop_clocks():
    import sys, time
    clocks = {id(c) for c in vars(time).values() if callable(c) and not isinstance(c, type)}
    def still(*_):
        return 0
    found = []
    for module in list(sys.modules.values()):
        found += [(module, name, value) for name, value in list(vars(module).items()) if id(value) in clocks]
    for module, name, _ in found:
        setattr(module, name, still)
    def start():
        for module, name, clock in found:
            setattr(module, name, clock)
    return start
def pop(self, /):
    for item in self:
        pass
    try:
        self.remove(item)
    except NameError:
        raise KeyError('pop from an empty set') from None
    return item
