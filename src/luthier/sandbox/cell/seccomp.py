"""A filter of system calls (seccomp-BPF): what the kernel refuses to a program whatever it runs.

The rules are a program of the kernel's packet filter, written here instruction by instruction, for x86_64
and aarch64. A call that came in another architecture's way (32-bit, x32) is refused, and so is every call
that is newer than this list.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterable

EPERM, ENOSYS = 1, 38
ALLOW = 0x7FFF0000
ERROR = 0x00050000  # SECCOMP_RET_ERRNO, with the error in its low half
LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # (AUDIT_ARCH, column of the tables)
# refused to every program: (x86_64, aarch64); None where the architecture has no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "seccomp": (317, 277),
    "io_setup": (206, 0),
    "io_destroy": (207, 1),
    "io_submit": (209, 2),
    "io_cancel": (210, 3),
    "io_getevents": (208, 4),
    "io_pgetevents": (333, 292),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
    "memfd_create": (319, 279),
    "execveat": (322, 281),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "create_module": (174, None),
    "get_kernel_syms": (177, None),
    "query_module": (178, None),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "syslog": (103, 116),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "adjtimex": (159, 171),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "sync": (162, 81),
    "syncfs": (306, 267),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "vmsplice": (278, 75),
    "lookup_dcookie": (212, 18),
    "remap_file_pages": (216, 234),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "nfsservctl": (180, 42),
    "ioprio_set": (251, 30),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "_sysctl": (156, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
}
# refused as well where the program has no processes and network of its own
REFUSED_WITHOUT_SPACES: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "getpriority": (140, 141),
    # Landlock leaves these alone: whoever may see a file may change its mode and its times
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
CLONE, SOCKET, SOCKETPAIR, IOCTL, PRLIMIT = (56, 220), (41, 198), (53, 199), (16, 29), (302, 261)
KILL, TGKILL = (62, 129), (234, 131)
# from this number on both architectures count alike; of the new calls these are allowed
NEW = 424
NEW_ALLOWED = (434, 436, 437, 439, 441, 449, 452, 453, 454, 455, 456)
NEW_SPACES = 0x7E020000  # every CLONE_NEW... that clone takes
THREAD = 0x00010000  # CLONE_THREAD
UNIX, INET, INET6, STREAM = 1, 2, 10, 1
TYPES = 0xF  # the kind of a socket without its flags
TYPING = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: they type into a terminal


def machine() -> tuple[int, int] | None:
    """(AUDIT_ARCH, column of the tables) of this machine; None where the filter knows no numbers for it."""
    return MACHINES.get(platform.machine()) if struct.calcsize("P") == 8 else None


class Filter:
    """Instructions, one after the other. A rule looks at the number of a call and at one argument."""

    def __init__(self):
        self.instructions: list[tuple[int, int, int, int]] = []

    def add(self, code: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        """One instruction; the jumps count instructions to leave out."""
        self.instructions.append((code, if_true, if_false, value & 0xFFFFFFFF))

    def refuse(self, number: int | None, error: int = EPERM) -> None:
        """A call is refused whatever its arguments are."""
        if number is not None:
            self.add(EQUAL, number, 0, 1)
            self.add(RETURN, ERROR | error)

    def rule(self, number: int, argument: int, tests: Iterable[tuple], allowed: bool) -> None:
        """A call is decided by the low half of an argument: `allowed` where one of the tests (code, value)
        holds, the opposite where none does.
        """
        tests = list(tests)
        hit, miss = (ALLOW, ERROR | EPERM) if allowed else (ERROR | EPERM, ALLOW)
        self.add(EQUAL, number, 0, len(tests) + 3)
        self.add(LOAD, ARGUMENTS + 8 * argument)
        for place, (code, value) in enumerate(tests):
            self.add(code, value, len(tests) - place, 0)
        self.add(RETURN, miss)
        self.add(RETURN, hit)

    def packed(self) -> bytes:
        """As the kernel reads it: struct sock_filter after struct sock_filter."""
        return b"".join(struct.pack("=HBBI", *line) for line in self.instructions)


def rules(architecture: int, column: int, spaces: bool, pid: int) -> Filter:
    """The filter for a program that has processes and network of its own (`spaces`), or has not."""
    bpf = Filter()
    bpf.add(LOAD, ARCHITECTURE)
    bpf.add(EQUAL, architecture, 1, 0)
    bpf.add(RETURN, ERROR | ENOSYS)
    bpf.add(LOAD, NUMBER)
    tables = [REFUSED] if spaces else [REFUSED, REFUSED_WITHOUT_SPACES]
    for table in tables:
        for numbers in table.values():
            bpf.refuse(numbers[column])
    for number in NEW_ALLOWED:
        bpf.add(EQUAL, number, 0, 1)
        bpf.add(RETURN, ALLOW)
    bpf.add(AT_LEAST, NEW, 0, 1)  # x32 has its bit far above
    bpf.add(RETURN, ERROR | ENOSYS)
    bpf.rule(IOCTL[column], 1, [(EQUAL, code) for code in TYPING], allowed=False)
    bpf.rule(PRLIMIT[column], 0, [(EQUAL, 0)], allowed=True)  # its own limits only
    # a pair of streams is all that asyncio needs; a datagram socket could be sent to a path
    pair = SOCKETPAIR[column]
    bpf.add(EQUAL, pair, 0, 8)
    bpf.add(LOAD, ARGUMENTS)
    bpf.add(EQUAL, UNIX, 0, 4)
    bpf.add(LOAD, ARGUMENTS + 8)
    bpf.add(AND, TYPES)
    bpf.add(EQUAL, STREAM, 0, 1)
    bpf.add(RETURN, ALLOW)
    bpf.add(RETURN, ERROR | EPERM)
    bpf.add(RETURN, ERROR | EPERM)
    if spaces:
        bpf.rule(SOCKET[column], 0, [(EQUAL, INET), (EQUAL, INET6)], allowed=True)
        bpf.rule(CLONE[column], 0, [(ANY_BIT, NEW_SPACES)], allowed=False)
    else:
        bpf.refuse(SOCKET[column])
        bpf.rule(CLONE[column], 0, [(ANY_BIT, THREAD)], allowed=True)
        bpf.rule(KILL[column], 0, [(EQUAL, pid)], allowed=True)
        bpf.rule(TGKILL[column], 0, [(EQUAL, pid)], allowed=True)
    bpf.add(RETURN, ALLOW)
    return bpf


def install(libc, spaces: bool, pid: int) -> bool:
    """Put the filter over this process and all that it starts; there is no way back. Needs no_new_privs."""
    import ctypes

    here = machine()
    if here is None:
        return False
    filter = rules(*here, spaces, pid)
    packed = filter.packed()
    buffer = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]

    program = Program(len(filter.instructions), ctypes.addressof(buffer))
    set_seccomp, mode_filter = 22, 2  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    return libc.prctl(set_seccomp, mode_filter, ctypes.byref(program), 0, 0) == 0
