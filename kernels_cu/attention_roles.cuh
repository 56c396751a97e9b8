// SPDX-License-Identifier: Apache-2.0
// What attention kernels share whose warps have roles (Hopper): a loader lets the TMA unit copy rows into shared
// memory, and workers multiply them. Barriers in shared memory join them. A block takes one item of work after another,
// and its loader is ahead of its workers, so no item begins with an empty pipeline.

#ifndef GPU3D_ATTENTION_ROLES_CUH
#define GPU3D_ATTENTION_ROLES_CUH

#include "attention.cuh"
#include "wgmma.cuh"

static_assert(D == 64 || D == 128, "rows of whole tiles");

#define ROW 64    // words of a row in shared memory; D = 128 is two tiles of them
#define GROUP 16  // rows: their slots are neighbours, because the size of a bucket is a multiple of 16

// ---- barriers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 address(const void *shared) { return (u32)__cvta_generic_to_shared(shared); }

__device__ __forceinline__ void initialize(u64 &barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u64 &barrier) { arrive(address(&barrier)); }
__device__ __forceinline__ void wait(u64 &barrier, int parity) {
    asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again;}"
                 :
                 : "r"(address(&barrier)), "r"(parity)
                 : "memory");
}

// Lets the TMA unit see barriers that this thread initialized.
__device__ __forceinline__ void fence_initialized() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival a warp.
__device__ __forceinline__ void arrive_as_warp(u64 &barrier) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) arrive(barrier);
}

// These order ordinary accesses to memory with those of products and bulk copies: in shared memory, and in all memory.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Waits for all ordinary copies that the warp started; products may then read them. Who copies calls this, not who
// reads: the fence is a barrier for all memory (MEMBAR).
__device__ __forceinline__ void finish_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    fence_shared();
    __syncwarp();
}

// ---- items ---------------------------------------------------------------------------------------------------------

// Item.scope is a row of the table, or -1 when nothing is left; end, hole and hole_end are those of struct Scope.
template <class Item>
__device__ __forceinline__ Scope scope_of(const Item &item, const int *table, int width, const Divisor &size) {
    return {table + (size_t)item.scope * width, size, item.end, item.hole, item.hole_end};
}

// Reads the nth item that the block takes, when its loader has put it there.
template <class Item>
__device__ __forceinline__ Item read_item(const Item items[2], u64 ready[2], u64 read[2], int nth) {
    wait(ready[nth & 1], nth >> 1 & 1);
    const Item item = items[nth & 1];
    arrive_as_warp(read[nth & 1]);
    return item;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// How far the words of a row are swizzled, in units of eight words.
__device__ __forceinline__ int swizzle(int row) { return row & 7; }

// What a lane copies of the rows of one head: eight words of every (256 / D)th row.
struct Part {
    const u16 *from;  // of slot 0 and up
    int row;          // words from one slot to the next
    bool loads;       // false: zeros, beyond view.dim
};

__device__ __forceinline__ Part part_of(const View &view, int head) {
    const int lane = threadIdx.x & 31, part = lane % (D / 8), first = lane / (D / 8);
    const u16 *head_data = (const u16 *)view.data + head * view.head;
    return {head_data + first * view.row + part * 8, view.row, part * 8 < view.dim};
}

// Whether `rows` rows from `position` on all hold points.
__device__ __forceinline__ bool whole_rows(const Scope &scope, int position, int rows) {
    return position + rows <= scope.end && (position + rows <= scope.hole || position >= scope.hole_end);
}

// The groups of `rows` rows from `position` on, one on each lane: its first slot, and which of its rows hold a point.
struct Groups {
    int slot;
    u32 points;
    bool whole;  // all rows do
};

__device__ __forceinline__ Groups groups_from(const Scope &scope, int position, int rows) {
    const bool whole = whole_rows(scope, position, rows);
    position += (threadIdx.x & 31) * GROUP;
    return {position < scope.end ? slot_at(scope, position) : 0, whole ? FULL : points_from(scope, position), whole};
}

__device__ __forceinline__ Groups group_of(const Groups &groups, int nth) {
    return {__shfl_sync(FULL, groups.slot, nth), __shfl_sync(FULL, groups.points, nth), groups.whole};
}

// Starts to copy a group to rows [row, row + GROUP) of a tile of `rows` rows in shared memory, where `row` is a
// multiple of GROUP. Rows that hold no point become zeros. A warp's lanes must all call this.
__device__ __forceinline__ void load_group(u16 *tile, int rows, int row, const Part &part, const Groups &group) {
    constexpr int STEP = 256 / D;  // rows that a warp copies at once
    const int lane = threadIdx.x & 31, column = lane % (D / 8), first = lane / (D / 8);
    const u16 *from = part.from + (long long)group.slot * part.row;
    const u32 to = address(tile + (column / 8 * rows + row + first) * ROW + (column % 8 ^ swizzle(first)) * 8);
    const auto copy = [&](int i, bool loads) {  // row `first` + i: their bits do not overlap
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"((to ^ swizzle(i) * 16) + i * ROW * 2), "l"(from + (long long)i * part.row),
                       "r"(loads ? 16 : 0)
                     : "memory");
    };
    if ((group.points & 0xffff) == 0xffff)
#pragma unroll
        for (int i = 0; i < GROUP; i += STEP) copy(i, part.loads);
    else
#pragma unroll
        for (int i = 0; i < GROUP; i += STEP) copy(i, part.loads && group.points >> first + i & 1);
}

// q, k, v or dO as the loader reads it: boxes of `box` slots of one head and up to 64 columns, through a CUtensorMap.
struct alignas(64) Source {
    u64 map[16];
    View view;
    int box;  // a multiple of GROUP, of which a bucket is a multiple
};

// Loads `count` groups of a head into a tile of `rows` rows, and arrives at a barrier once they are there: by the TMA
// unit if all rows hold points, else by ordinary copies. All lanes of a warp must call this.
__device__ __forceinline__ void load_rows(
    u16 *tile, int rows, const Source &from, int head, const Groups &groups, int count, u64 &barrier
) {
    const int lane = threadIdx.x & 31;
    if (groups.whole) {
        if (lane == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(&barrier)),
                         "r"(count * GROUP * D * 2)
                         : "memory");
        __syncwarp();
#pragma unroll 1
        for (int nth = 0; nth < count; nth += from.box / GROUP) {
            const int slot = __shfl_sync(FULL, groups.slot, nth);
            if (lane == 0)
#pragma unroll
                for (int column = 0; column < D; column += ROW)
                    asm volatile(
                        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(address(tile + column * rows + nth * GROUP * ROW)),
                        "l"(from.map), "r"(column), "r"(head), "r"(slot), "r"(address(&barrier))
                        : "memory"
                    );
        }
    } else {
        const Part part = part_of(from.view, head);
#pragma unroll 1
        for (int nth = 0; nth < count; ++nth) load_group(tile, rows, nth * GROUP, part, group_of(groups, nth));
        finish_copies();
        arrive_as_warp(barrier);
    }
}

// Transposes the words of four neighbouring lanes: word i of lane c becomes word c of lane i.
__device__ __forceinline__ void exchange(u32 words[4]) {
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
        const bool high = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 &one = words[step == 1 ? 2 * i : i], &other = words[step == 1 ? 2 * i + 1 : i + 2];
            const u32 got = __shfl_xor_sync(FULL, high ? one : other, step);
            if (high) one = got;
            else other = got;
        }
    }
}

// Writes rows `slot` and slot + 8 of a head, unless slot is negative. word(n, i) is the lane's part of row slot + 8 i:
// columns c and c + 1, where c = 8 n + 2 (lane % 4). A warp's lanes must all call this.
template <class Word>
__device__ __forceinline__ void store_rows(const View &view, int head, int slot, Word word) {
    const int part = (threadIdx.x & 3) * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u16 *to = (u16 *)view.data + head * view.head + row_of(view, slot + 8 * i) + part;
#pragma unroll
        for (int n = 0; n < D / 8; n += 4) {
            u32 words[4] = {word(n, i), word(n + 1, i), word(n + 2, i), word(n + 3, i)};
            exchange(words);
            if (slot >= 0 && n * 8 + part < view.dim) *(uint4 *)(to + n * 8) = {words[0], words[1], words[2], words[3]};
        }
    }
}

#endif  // GPU3D_ATTENTION_ROLES_CUH
