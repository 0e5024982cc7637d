"""Control flow, memory, copies and tensor cores of the emulated GPU, and the faults that it must find."""

import pytest
import torch

from .assembly import run
from .block import Divergence, UndefinedRegister
from .device import Device
from .memory import Misaligned, NotLanded, OutOfBounds, Race, Uninitialised


def test_threads_part_and_meet_again():
    """Each adds up the numbers to its own, in a loop that the threads leave one by one; then all pass a barrier."""
    out = torch.zeros(64, dtype=torch.int32)
    body = """
        mov.b32 %r1, 0;  mov.b32 %r2, 0;
        $again: add.s32 %r2, %r2, 1;  add.s32 %r1, %r1, %r2;
        setp.lt.u32 %p1, %r2, %r0;
        @%p1 bra $again;
        bar.sync 0;
        @!%p1 st.global.b32 [%rd10], %r1;
    """
    run(body, out, threads=64)
    assert out.tolist() == [max(n, 1) * (max(n, 1) + 1) // 2 for n in range(64)]


def test_guards_and_returns():
    out = torch.full((32,), -1, dtype=torch.int32)
    run("setp.ge.u32 %p1, %r0, 8; @%p1 ret; @!%p1 st.global.b32 [%rd10], %r0; mov.u32 %r1, %ctaid.x;", out)
    assert out.tolist() == [*range(8), *[-1] * 24]


def test_blocks_know_where_they_are():
    out = torch.empty(2, 3, 32, dtype=torch.int32)
    body = """
        mov.u32 %r1, %ctaid.x;  mov.u32 %r2, %ctaid.y;  mov.u32 %r3, %nctaid.x;
        mad.lo.s32 %r4, %r2, %r3, %r1;  mad.lo.s32 %r5, %r4, 32, %r0;  mul.wide.u32 %rd20, %r5, 4;
        add.s64 %rd21, %rd0, %rd20;  st.global.b32 [%rd21], %r4;
    """
    run(body, out, grid=(3, 2, 1))
    assert torch.equal(out, torch.arange(6, dtype=torch.int32).view(2, 3, 1).expand(2, 3, 32))


REVERSE = """
    shl.b32 %r1, %r0, 2;  sub.s32 %r2, 252, %r1;  mov.b32 %r9, global_smem;  add.s32 %r3, %r9, %r1;
    st.shared::cta.b32 [ %r3 + 0 ], { %r0 };
    bar.sync 0;
    ld.shared.b32 %r4, [%r2];
    st.global.b32 [%rd10], %r4;
"""


def test_threads_exchange_through_shared_memory():
    out = torch.empty(64, dtype=torch.int32)
    run(REVERSE, out, threads=64)
    assert out.tolist() == list(range(63, -1, -1))


FAULTS = {
    "no barrier before a read": (Race, REVERSE.replace("bar.sync 0;", "")),
    "no barrier before the next write": (
        Race,
        REVERSE.replace("st.global", "st.shared.b32 [%r3], %r4; st.global"),
    ),
    "no barrier after several read": (
        Race,
        """mov.b32 %r1, 0;  setp.eq.u32 %p1, %r0, 63;  @%p1 st.shared.b32 [%r1], 5;
        bar.sync 0;  ld.shared.b32 %r2, [%r1];  @%p1 st.shared.b32 [%r1], 6;""",
    ),
    "two values in one place": (Race, "mov.b32 %r1, 0; st.shared.b32 [%r1], %r0;"),
    "two threads write one global number": (Race, "st.global.b32 [%rd0], 1;"),
    "a global number that another thread wrote": (
        Race,
        "st.global.b32 [%rd10], %r0; bar.sync 0; ld.global.b32 %r1, [%rd0];",
    ),
    "shared memory that nobody wrote": (Uninitialised, REVERSE.replace("sub.s32 %r2, 252", "sub.s32 %r2, 512")),
    "global memory that nobody wrote": (Uninitialised, "ld.global.b32 %r1, [%rd10];"),
    "past the end of shared memory": (OutOfBounds, REVERSE.replace("[ %r3 + 0 ]", "[ %r3 + 800 ]")),
    "before shared memory": (OutOfBounds, REVERSE.replace("[%r2]", "[%r2+-4]")),
    "past the end of a tensor": (OutOfBounds, "st.global.b32 [%rd10+4], %r0;"),
    "before a tensor": (OutOfBounds, "st.global.b32 [%rd10+-4], %r0;"),
    "the address 0": (OutOfBounds, "mov.b64 %rd20, 0; ld.global.b32 %r1, [%rd20];"),
    "half a number": (Misaligned, "st.global.b32 [%rd10+2], %r0;"),
    "half a row": (Misaligned, REVERSE.replace("st.global.b32 [%rd10], %r4", "ld.shared.v2.b32 {%r5, %r6}, [%r2]")),
    "a register that nobody wrote": (UndefinedRegister, "add.s32 %r1, %r2, 1;"),
    "a register that only some threads wrote": (
        UndefinedRegister,
        "setp.lt.u32 %p1, %r0, 9; @%p1 mov.b32 %r1, 1; add.s32 %r2, %r1, 1;",
    ),
    "a barrier that not all reach": (Divergence, "setp.lt.u32 %p1, %r0, 32; @%p1 bra $end; bar.sync 0; $end: ret;"),
    "a shuffle without some threads": (
        Divergence,
        "setp.lt.u32 %p1, %r0, 9; @%p1 bra $end; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; $end: ret;",
    ),
    "an unknown instruction": (NotImplementedError, "tanh.approx.f32 %r1, %r0;"),
    "an unknown condition": (NotImplementedError, "setp.lt.and.s32 %p1, %r0, 1, %p2;"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name):
    fault, body = FAULTS[name]
    with Device() as device:
        out = torch.empty(64, dtype=torch.int32)
        with pytest.raises(fault):
            run(body, out, threads=64, device=device)


def test_gaps_between_rows_are_out_of_bounds():
    rows = torch.zeros(32, 4, dtype=torch.int32)[:, :3]
    address = "mul.wide.u32 %rd20, %r0, 16; add.s64 %rd21, %rd0, %rd20;"
    run(f"{address} ld.global.b32 %r1, [%rd21+8];", rows)
    with pytest.raises(OutOfBounds, match="argument 0"):
        run(f"{address} ld.global.b32 %r1, [%rd21+12];", rows)


def test_what_the_host_writes_is_initialised():
    with Device() as device:
        filled, part = torch.empty(32, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
        torch.add(torch.arange(32).int(), 1, out=filled)
        part[1:].fill_(3)
        read = "ld.global.b32 %r1, [%rd10];"
        run(read, filled, device=device)
        with pytest.raises(Uninitialised):
            run(read, part, device=device)


def test_threads_that_write_the_same_do_not_race():
    out = torch.empty(64, dtype=torch.int32)
    write = "mov.b32 %r1, 0; st.shared.b32 [%r1], 7; bar.sync 0;"
    run(write + "ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd10], %r2;", out, threads=64)
    assert out.tolist() == [7] * 64


def test_a_kernel_initialises_what_it_writes_for_the_next():
    with Device() as device:
        out, copy = torch.empty(32, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
        run("st.global.b32 [%rd10], %r0;", out, device=device)
        run("ld.global.b32 %r1, [%rd10]; st.global.b32 [%rd11], %r1;", out, copy, device=device)
    assert copy.tolist() == list(range(32))


COPY = """
    shl.b32 %r1, %r0, 4;  mul.wide.u32 %rd20, %r0, 16;  add.s64 %rd21, %rd0, %rd20;
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd21 + 0 ], 0x10;  cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    shl.b32 %r2, %r0, 2;  ld.shared.b32 %r3, [%r2];  st.global.b32 [%rd11], %r3;
"""


def test_copies_land_when_they_are_awaited():
    source, out = torch.arange(128, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    run(COPY, source, out)
    assert out.tolist() == list(range(32))
    with pytest.raises(NotLanded):
        run(COPY.replace("cp.async.wait_group 0;", ""), source, out)
    with pytest.raises(NotLanded):
        run(COPY.replace("cp.async.wait_group 0;", "cp.async.wait_group 1;"), source, out)
    with pytest.raises(NotLanded):
        run(COPY.replace("cp.async.wait_group 0;", "st.shared.b32 [%r1], 0;"), source, out)
    with pytest.raises(Race):  # the thread that copied sees it, the others only after a barrier
        run(COPY.replace("bar.sync 0;", ""), source, out)
    with pytest.raises(Race):
        run("mov.b32 %r9, 0; st.shared.b32 [%r9], 1; " + COPY, source, out)
    with pytest.raises(OutOfBounds):
        run(COPY, source[:127], out)


def test_older_groups_land_while_newer_ones_are_under_way():
    source = torch.arange(64, dtype=torch.int32)
    out = torch.empty(32, dtype=torch.int32)
    begin = "cp.async.ca.shared.global [ %r1 + {0} ], [ %rd10 + {0} ], 0x4; cp.async.commit_group;"
    body = "shl.b32 %r1, %r0, 2;" + begin.format(0) + begin.format(128) + "cp.async.wait_group 1;"
    run(body + "ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd11], %r2;", source, out)
    assert out.tolist() == list(range(32))
    with pytest.raises(NotLanded):
        run(body + "ld.shared.b32 %r2, [%r1+128];", source, out)


def test_a_copy_of_nothing_writes_zeros_and_reads_nowhere():
    out = torch.empty(32, dtype=torch.int32)
    body = """
        shl.b32 %r1, %r0, 4;  mov.b64 %rd20, 0;  mov.b32 %r2, 0;
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10, %r2;  cp.async.wait_all;
        ld.shared.b32 %r3, [%r1+12];  st.global.b32 [%rd10], %r3;
    """
    run(body, out)
    assert not out.any()


def test_warps_exchange_and_reduce():
    x, out = torch.randint(-(2**31), 2**31, (2, 64)).int()
    load, store = "ld.global.b32 %r1, [%rd10];", "st.global.b32 [%rd11], %r2;"
    number = torch.arange(64)

    def result(instruction):
        run(load + instruction + store, x, out, threads=64)
        return out.clone()

    assert torch.equal(result("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;"), x[number ^ 5])
    lane = "sub.s32 %r3, 100, %r0; and.b32 %r3, %r3, 31;"
    expected = x[number // 32 * 32 + (100 - number) % 32]
    assert torch.equal(result(lane + "shfl.sync.idx.b32 %r2, %r1, %r3, 31, -1;"), expected)
    for name in ("min", "max"):
        expected = getattr(x.view(2, 32), f"a{name}")(1).repeat_interleave(32)
        assert torch.equal(result(f"mov.b32 %r3, -1; redux.sync.{name}.s32 %r2, %r1, %r3;"), expected)


def fragment(matrix: torch.Tensor, places) -> torch.Tensor:
    """The numbers that each thread of a warp holds of a matrix: 32-bit words, `thread register`."""
    held = [[matrix[place] for place in places(lane // 4, lane % 4)] for lane in range(32)]
    return torch.stack([torch.stack(row) for row in held]).view(torch.int32)


def places_of_a(g, t):
    """As the manual lays them down: of thread t in group g, two halves for each register."""
    return [(g + 8 * (i % 2), 2 * t + half + 8 * (i // 2)) for i in range(4) for half in range(2)]


def places_of_b(g, t):
    return [(2 * t + half + 8 * i, g) for i in range(2) for half in range(2)]


def places_of_c(g, t):
    return [(g + 8 * (i // 2), 2 * t + i % 2) for i in range(4)]


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_products_of_matrices(name, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    out = torch.empty(32, 4, dtype=torch.int32)
    body = f"""
        mul.wide.u32 %rd20, %r0, 16;  mul.wide.u32 %rd21, %r0, 8;
        add.s64 %rd22, %rd0, %rd20;  add.s64 %rd23, %rd1, %rd21;
        add.s64 %rd24, %rd2, %rd20;  add.s64 %rd25, %rd3, %rd20;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd22];
        ld.global.v2.b32 {{%r5, %r6}}, [%rd23];
        ld.global.v4.b32 {{%r11, %r12, %r13, %r14}}, [%rd24];
        mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32
            {{%r7, %r8, %r9, %r10}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r11, %r12, %r13, %r14}};
        st.global.v4.b32 [%rd25], {{%r7, %r8, %r9, %r10}};
    """
    run(body, fragment(a, places_of_a), fragment(b, places_of_b), fragment(c, places_of_c), out)
    expected = fragment((a.double() @ b.double() + c).float(), places_of_c).view(torch.float32)
    torch.testing.assert_close(out.view(torch.float32), expected, rtol=1e-5, atol=1e-5)


def test_matrices_are_loaded_in_the_order_of_products():
    """ldmatrix gives a as mma wants it, and, transposed, b, from rows in shared memory; two warps, a matrix each."""
    a, b = torch.arange(512).view(2, 16, 16).short(), torch.arange(256).view(2, 16, 8).short()
    got_a, got_b = torch.empty(64, 4, dtype=torch.int32), torch.empty(64, 2, dtype=torch.int32)
    body = """
        mul.wide.u32 %rd20, %r0, 16;  add.s64 %rd21, %rd0, %rd20;  ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd21];
        shl.b32 %r5, %r0, 4;  st.shared.v4.b32 [%r5], {%r1, %r2, %r3, %r4};
        mul.wide.u32 %rd22, %r0, 8;  add.s64 %rd23, %rd1, %rd22;  ld.global.v2.b32 {%r6, %r7}, [%rd23];
        shl.b32 %r8, %r0, 3;  st.shared.v2.b32 [%r8+1024], {%r6, %r7};
        bar.sync 0;
        shr.u32 %r9, %r0, 5;  and.b32 %r10, %r0, 15;  bfe.u32 %r11, %r0, 4, 1;
        shl.b32 %r12, %r9, 9;  shl.b32 %r13, %r10, 5;  shl.b32 %r14, %r11, 4;
        add.s32 %r15, %r12, %r13;  add.s32 %r15, %r15, %r14;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r15];
        shl.b32 %r16, %r9, 8;  shl.b32 %r17, %r10, 4;  add.s32 %r18, %r16, %r17;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r24, %r25}, [%r18+1024];
        add.s64 %rd24, %rd2, %rd20;  st.global.v4.b32 [%rd24], {%r20, %r21, %r22, %r23};
        add.s64 %rd25, %rd3, %rd22;  st.global.v2.b32 [%rd25], {%r24, %r25};
    """
    run(body, a, b, got_a, got_b, threads=64, shared=2048)
    assert torch.equal(got_a, torch.cat([fragment(matrix, places_of_a) for matrix in a]))
    assert torch.equal(got_b, torch.cat([fragment(matrix, places_of_b) for matrix in b]))
