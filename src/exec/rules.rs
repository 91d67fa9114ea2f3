//! The policy as data: what programs may import and name, each entry with its reason.
//!
//! The sandbox makes programs harmless whatever they name. These rules keep tasks what tasks must be: the same result every
//! time, from nothing but the program and its input.

/// A name and why it stands in its table.
pub(crate) type Rule = (&'static str, &'static str);

/// Modules that a program may import.
pub(crate) const ALLOWED_MODULES: &[Rule] = &[
    ("abc", "declares interfaces"),
    ("array", "pure data structure"),
    ("base64", "pure function of bytes"),
    ("binascii", "pure function of bytes"),
    ("bisect", "pure algorithm"),
    ("cmath", "pure mathematics"),
    ("collections", "pure data structures"),
    ("contextlib", "control flow"),
    ("copy", "pure function of values"),
    ("dataclasses", "declares records"),
    ("decimal", "pure arithmetic"),
    ("difflib", "pure algorithm"),
    ("enum", "declares constants"),
    ("fractions", "pure arithmetic"),
    ("functools", "higher-order functions"),
    ("graphlib", "pure algorithm"),
    ("heapq", "pure algorithm"),
    ("itertools", "pure iterators"),
    ("json", "pure function of text"),
    ("keyword", "constants"),
    ("math", "pure mathematics"),
    ("numbers", "declares interfaces"),
    ("operator", "pure functions"),
    ("pprint", "pure function of values"),
    ("queue", "pure data structure without threads"),
    ("re", "pure algorithm"),
    ("statistics", "pure mathematics"),
    ("string", "constants and formatting"),
    ("struct", "pure function of bytes"),
    ("textwrap", "pure function of text"),
    ("types", "names of types"),
    ("typing", "declares types"),
    ("unicodedata", "constants"),
    ("zlib", "pure function of bytes"),
];

/// Modules that are there in Python but not for programs.
pub(crate) const BANNED_MODULES: &[Rule] = &[
    ("asyncio", "input and output"),
    ("bcrypt", "cryptography"),
    ("builtins", "changes the meaning of every program"),
    ("calendar", "depends on the clock"),
    ("code", "runs text as code"),
    ("concurrent", "processes"),
    ("ctypes", "native code"),
    ("datetime", "depends on the clock"),
    ("dis", "interpreter internals"),
    ("gc", "interpreter internals"),
    ("hashlib", "cryptography"),
    ("hmac", "cryptography"),
    ("importlib", "import system"),
    ("inspect", "interpreter internals"),
    ("io", "input and output"),
    ("logging", "input and output"),
    ("marshal", "interpreter internals"),
    ("multiprocessing", "processes"),
    ("os", "operating system"),
    ("pathlib", "file system"),
    ("pebble", "processes"),
    ("pickle", "runs data as code"),
    ("posix", "operating system"),
    ("random", "not deterministic"),
    ("runpy", "runs text as code"),
    ("secrets", "not deterministic"),
    ("shutil", "file system"),
    ("signal", "processes"),
    ("socket", "network"),
    ("subprocess", "processes"),
    ("sys", "interpreter internals"),
    ("tempfile", "file system"),
    ("threading", "threads"),
    ("time", "depends on the clock"),
    ("uuid", "not deterministic"),
    ("weakref", "depends on when garbage is collected"),
];

/// Builtin names that a program may not use. Names with two underscores on both sides are refused as reflection unless
/// [`ALLOWED_DUNDERS`] has them.
pub(crate) const BANNED_NAMES: &[Rule] = &[
    ("__builtins__", "changes the meaning of every program"),
    ("__import__", "import system"),
    ("breakpoint", "debugger"),
    ("compile", "runs text as code"),
    ("delattr", "reflection"),
    ("eval", "runs text as code"),
    ("exec", "runs text as code"),
    ("exit", "ends the process"),
    ("getattr", "reflection"),
    ("globals", "reflection"),
    ("hash", "the seed of the process"),
    ("help", "input and output"),
    ("id", "an address: not deterministic"),
    ("input", "input and output"),
    ("locals", "reflection"),
    ("memoryview", "an address: not deterministic"),
    ("open", "file system"),
    ("quit", "ends the process"),
    ("setattr", "reflection"),
    ("vars", "reflection"),
];

/// Attributes that a program may not read or set. Those with two underscores on both sides are refused as reflection
/// unless [`ALLOWED_DUNDERS`] has them.
pub(crate) const BANNED_ATTRIBUTES: &[Rule] = &[
    ("CodeType", "code objects reach the interpreter"),
    ("ForwardRef", "runs text as code"),
    ("FunctionType", "code objects reach the interpreter"),
    ("ag_frame", "frames reach the interpreter"),
    ("attrgetter", "reflection"),
    ("cr_frame", "frames reach the interpreter"),
    ("f_back", "frames reach the interpreter"),
    ("f_builtins", "frames reach the interpreter"),
    ("f_code", "frames reach the interpreter"),
    ("f_globals", "frames reach the interpreter"),
    ("f_locals", "frames reach the interpreter"),
    ("get_type_hints", "runs text as code"),
    ("gi_code", "code objects reach the interpreter"),
    ("gi_frame", "frames reach the interpreter"),
    ("methodcaller", "reflection"),
    ("tb_frame", "frames reach the interpreter"),
    ("tb_next", "frames reach the interpreter"),
];

/// Names and attributes with two underscores that programs commonly use without harm.
pub(crate) const ALLOWED_DUNDERS: &[Rule] = &[
    ("__debug__", "a constant"),
    ("__doc__", "a text of the program's own"),
    ("__init__", "how a class calls its parent"),
    ("__len__", "the method behind len"),
    ("__name__", "a text of the program's own"),
    ("__post_init__", "how dataclasses set up"),
    ("__slots__", "how a class saves memory"),
    ("__version__", "a text of the program's own"),
];
