// SPDX-License-Identifier: Apache-2.0
// APML: the transport plan from the entries of both sides, its Sinkhorn iterations, the loss and the gradients, in one
// cooperative launch.
//
// Rows are slots of pred, columns slots of target, both in the order of the index: neighbours in space are neighbours
// in memory.
//   merge     collects each row's entries of P1 and P2, sorts them by column and joins them: P = (P1 + P2) / 2, or the
//             minimum. A row keeps the memory of both, so there are gaps between rows.
//   columns   lists each column's entries, sorted by row
//   Sinkhorn  iterations times: rows /= (row sum + EPSILON), then columns /= (column sum + EPSILON)
//             (CUDA-APML, section 3.3);
//             the weights stay as they are, and each row and column has a scale: P_ij = weight_ij (scale_i scale_j)
//   loss      sum P_ij C_ij; dL/dx_i = sum_j P_ij (x_i - y_j) / C_ij, the same for y_j; P is held constant
//
// One lane works on a row or column. Long ones are listed and distributed over all warps, since they tend to be
// neighbours. Entries arrive in any order and are sorted, so all sums have a fixed order. Counts and cursors are
// integers, whose atomics give the same result in any order. The whole grid waits between steps, and then reads from L2
// again: lanes load BATCH values at a time. For Sinkhorn each block keeps its rows and columns in shared memory, if all
// blocks can; then only scales are exchanged. Both ways add the same numbers in the same order, so they give the same
// bits. With REAL, for float64 clouds, coordinates, losses and gradients are doubles; weights are floats always.

#ifndef MINIMUM
#define MINIMUM 0  // symmetrize: 0 "mean", 1 "min"
#endif
#define THREADS 512  // mirrored by gpu3d/cuda/transport.py, like the next
#define BLOCKS 2     // blocks a multiprocessor; all run at once
#define ROW 256      // most entries of a row that a warp sorts
#define LONG 16      // most entries of a row that one lane adds
#define BATCH 8      // entries that a lane loads at a time
#define OWNED 5248   // entries that a block keeps in shared memory, 48 KiB together with the rest
#define NODE 1024    // slots whose losses are summed first; a node of the index

#include "clouds.cuh"
#include "grid.cuh"
#include "neighbors.cuh"
#include "scan.cuh"
#include "sort_rows.cuh"
#include "transport.cuh"

#define EPSILON 1e-8

// One of the two batches of clouds.
struct Side {
    const Row *rows;    // [slots]
    const u32 *starts;  // [slots] first entry of each point
    const u32 *counts;  // [slots] entries of each point
    u32 *cursors;       // [slots] starts as the number of the other side's entries for the slot; then scratch
    u32 *first;         // [slots + 1] where each row (column) of the plan begins
    u32 *longs;        // [slots] rows with more than LONG entries, in any order; from the end, those with more than ROW
    u32 *long_counts;  // [2] how many of both; starts at 0
    double *scale;     // [slots]
    real *gradient;    // [points, 3], or null
    double *sums;      // [nodes] sums of losses
};

// The plan, in rows with gaps.
struct Plan {
    u64 *keys;     // [capacity] column << 32 | bits of the weight << 1 | (1 for P2); later the columns' entries
    u64 *spare;    // [capacity] scratch for sorting long rows; later the rows' entries
    u32 *lengths;  // [slots of x] entries of each row
    u32 *place;    // [capacity] for each entry in column order its place in row order; no gaps
    u32 *row;      // [capacity] row of each entry; -1 in gaps

    __device__ __forceinline__ Entry *rows() const { return (Entry *)spare; }
    __device__ __forceinline__ Entry *columns() const { return (Entry *)keys; }
};

// ---- prefix sums over the grid -------------------------------------------------------------------------------------

// The range of slots that this block works on.
struct Range {
    int begin, end;
};
__device__ __forceinline__ Range range_of(int slots) {
    const int each = (slots + (int)gridDim.x - 1) / (int)gridDim.x;
    return {min((int)blockIdx.x * each, slots), min(((int)blockIdx.x + 1) * each, slots)};
}

// first[i] = the sum of count(j) over j < i, for i = 0..slots. The whole grid waits once.
template <class Count>
__device__ void prefix_sums(u32 *first, int slots, Count count, u32 *of_blocks, u32 *arrived, u32 &awaited) {
    const Range range = range_of(slots);
    u32 mine = 0, all;
    for (int i = range.begin + threadIdx.x; i < range.end; i += THREADS) mine += count(i);
    scan_of_block<WARPS>(mine, all);
    if (threadIdx.x == 0) of_blocks[blockIdx.x] = all;
    wait_for_grid(arrived, awaited);
    u32 earlier = 0;
    for (int block = threadIdx.x; block < blockIdx.x; block += THREADS) earlier += of_blocks[block];
    u32 at;
    scan_of_block<WARPS>(earlier, at);
    for (int base = range.begin; base < range.end; base += THREADS) {
        const int i = base + (int)threadIdx.x;
        const u32 before = scan_of_block<WARPS>(i < range.end ? count(i) : 0, all);
        if (i < range.end) first[i] = at + before;
        at += all;
    }
    if (range.begin < range.end && range.end == slots && threadIdx.x == 0) first[slots] = at;
    if (slots == 0 && blockIdx.x == 0 && threadIdx.x == 0) first[0] = 0;
}

// ---- rows and columns ----------------------------------------------------------------------------------------------

// Calls visit(slot, lane, lanes) for each slot: on one lane, or on the whole warp if count(slot) > LONG. All lanes of a
// warp must call this.
template <class Count, class Visit>
__device__ __forceinline__ void each_slot(int slots, Count count, Visit visit) {
    const int lane = threadIdx.x & 31;
    for (int base = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * 32; base < slots; base += gridDim.x * THREADS) {
        const int slot = base + lane;
        const bool is_long = slot < slots && count(slot) > LONG;
        if (slot < slots && !is_long) visit(slot, 0, 1);
        for (u32 left = __ballot_sync(FULL, is_long); left; left &= left - 1) visit(base + __ffs(left) - 1, lane, 32);
    }
}

__device__ __forceinline__ u32 width(const Side &side, int slot) { return side.first[slot + 1] - side.first[slot]; }

__device__ __forceinline__ void list_longs(const Side &side, int slots) {
    for (int slot = blockIdx.x * THREADS + threadIdx.x; slot < slots; slot += gridDim.x * THREADS) {
        const u32 count = width(side, slot);
        if (count > ROW) side.longs[slots - 1 - atomicAdd(&side.long_counts[1], 1u)] = slot;
        else if (count > LONG) side.longs[atomicAdd(&side.long_counts[0], 1u)] = slot;
    }
}

// The same with counts from side.first and the list of long rows.
template <class Visit>
__device__ __forceinline__ void each_line(const Side &side, int slots, Visit visit) {
    for (int slot = blockIdx.x * THREADS + threadIdx.x; slot < slots; slot += gridDim.x * THREADS)
        if (width(side, slot) <= LONG) visit(slot, 0, 1);
    const u32 longs = side.long_counts[0], all = longs + side.long_counts[1];
    for (u32 i = blockIdx.x + (threadIdx.x >> 5) * gridDim.x; i < all; i += gridDim.x * WARPS)
        visit(side.longs[i < longs ? i : slots - 1 - (i - longs)], threadIdx.x & 31, 32);
}

// Sorts the keys of each row and calls write(slot, number, key) for them in order.
template <class Key, class Write>
__device__ __forceinline__ void sort_lines(
    const Side &side, int slots, Key *keys, Key *spare, Key *shared, Write write
) {
    const int warp = uniform(threadIdx.x >> 5);
    for (int slot = blockIdx.x * WARPS + warp; slot < slots; slot += gridDim.x * WARPS) {
        const u32 count = uniform(width(side, slot));
        if (count > 1 && count <= ROW)  // a single key is sorted
            sort_short(keys + side.first[slot], count, shared + warp * STAGED, [&](int e, Key key) {
                write(slot, e, key);
            });
    }
    __syncthreads();
    for (u32 i = blockIdx.x; i < side.long_counts[1]; i += gridDim.x) {
        const int slot = side.longs[slots - 1 - i];
        const u32 first = side.first[slot];
        sort_long(keys + first, spare + first, shared, width(side, slot), [&](int e, Key key) { write(slot, e, key); });
    }
}

__device__ __forceinline__ float weight_of(u64 key) { return __uint_as_float((u32)key >> 1); }
__device__ __forceinline__ u32 column_of(u64 key) { return key >> 32; }

// Whether the entry after keys[e] is in the same column. Then the first is from P1 and the second from P2.
__device__ __forceinline__ bool is_pair(const u64 *keys, u32 e, u32 end) {
    return e + 1 < end && column_of(keys[e]) == column_of(keys[e + 1]);
}

// ---- Sinkhorn ------------------------------------------------------------------------------------------------------

// Divides a row (column) by its sum, by updating its scale.
template <class At>
__device__ __forceinline__ void rescale(
    double *own, const double *others, u32 begin, u32 end, int lane, int lanes, At at
) {
    if (begin == end) return;
    const double before = *own;
    double sum = 0;
    for (u32 base = begin; base < end; base += BATCH * lanes) {
        Entry entry[BATCH];
        double scale[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            const u32 e = base + k * lanes + lane;
            entry[k] = e < end ? at(e) : Entry{FULL, 0};
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) scale[k] = entry[k].other != FULL ? others[entry[k].other] : 0;
#pragma unroll
        for (int k = 0; k < BATCH; ++k) sum = fma((double)entry[k].weight, scale[k], sum);
    }
    if (lanes > 1) sum = sum_of_warp(sum);
    if (lane == 0) *own = before / (before * sum + EPSILON);
}

// The rows (columns) that a block keeps in shared memory.
struct Owned {
    unsigned short begin[THREADS], end[THREADS];  // entries of each
    unsigned short longs[THREADS];                // those with more than LONG entries, in any order
    u32 long_count;
};

template <class Visit>
__device__ __forceinline__ void each_line(const Owned &owned, int lines, Visit visit) {
    const int line = threadIdx.x;
    if (line < lines && owned.end[line] - owned.begin[line] <= LONG) visit(line, 0, 1);
    for (u32 i = threadIdx.x >> 5; i < owned.long_count; i += WARPS) visit(owned.longs[i], threadIdx.x & 31, 32);
}

// Loads the rows (columns) of a range into shared memory, behind `used` entries: count(line) entries at(e) from
// first(line) on. Returns how many entries are then used, or more than OWNED if they do not fit. The whole block calls
// this.
template <class First, class Count, class At>
__device__ __forceinline__ u32
load_lines(Owned &owned, Entry *entries, u32 used, Range range, First first, Count count, At at) {
    const int lines = range.end - range.begin, mine = range.begin + (int)threadIdx.x;
    if (threadIdx.x == 0) owned.long_count = 0;
    u32 sum;
    const u32 own = mine < range.end ? count(mine) : 0, before = scan_of_block<WARPS>(own, sum), all = used + sum;
    if (lines > THREADS || all > OWNED) return OWNED + 1;
    owned.begin[threadIdx.x] = used + before;
    owned.end[threadIdx.x] = used + before + own;
    if (own > LONG) owned.longs[atomicAdd(&owned.long_count, 1u)] = threadIdx.x;
    __syncthreads();
    each_line(owned, lines, [&](int line, int lane, int lanes) {
        const u32 to = owned.begin[line], from = first(range.begin + line);
        for (u32 e = lane; e < owned.end[line] - to; e += lanes) entries[to + e] = at(from + e);
    });
    return all;
}

// ---- the loss ------------------------------------------------------------------------------------------------------

// The loss of a row (column) and the gradient of its point, on lane 0. NaN if the point is not finite.
struct Contribution {
    double loss, x, y, z;
};
template <class Write>
__device__ __forceinline__ Contribution contribution_of(
    const Row &point,
    double scale,
    const Row *others,
    const double *scales,
    const Entry *entries,
    u32 begin,
    u32 end,
    int lane,
    int lanes,
    Write write
) {
    Contribution contribution = {0, 0, 0, 0};
    for (u32 e = begin + lane; e < end; e += lanes) {
        const Entry entry = entries[e];
        const Row to = others[entry.other];
        const double x = (double)point.x - to.x, y = (double)point.y - to.y, z = (double)point.z - to.z;
        const float value = (float)(entry.weight * (scale * scales[entry.other]));
        const double c = sqrt(x * x + y * y + z * z), weight = value, share = c > 0 ? weight / c : 0;
        write(e, value);
        contribution.loss += weight * c;
        contribution.x += share * x;
        contribution.y += share * y;
        contribution.z += share * z;
    }
    if (lanes > 1)
        contribution = {
            sum_of_warp(contribution.loss), sum_of_warp(contribution.x), sum_of_warp(contribution.y),
            sum_of_warp(contribution.z)
        };
    if (!is_finite(point)) contribution = {NAN_DOUBLE, NAN_DOUBLE, NAN_DOUBLE, NAN_DOUBLE};
    return contribution;
}

__device__ __forceinline__ void write_gradient(
    real *gradient, int point, const Contribution &contribution, double parts
) {
    gradient[3 * (size_t)point] = (real)(contribution.x / parts);
    gradient[3 * (size_t)point + 1] = (real)(contribution.y / parts);
    gradient[3 * (size_t)point + 2] = (real)(contribution.z / parts);
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void transport_plan(
    const __grid_constant__ Side x,  // pred
    const __grid_constant__ Side y,  // target
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    const __grid_constant__ Plan plan,
    const Entry *entries,           // [capacity] of both sides; plan.place and plan.row may use this memory later
    const u64 *__restrict__ total,  // [] their number
    u64 capacity,
    int iterations,
    double *losses,           // [slots of x] loss of each row; later [clouds] at the front
    u32 *of_blocks,           // [blocks] scratch
    u32 *arrived,             // [2] blocks that wait, and blocks whose rows do not fit; start at 0
    real *__restrict__ each,  // [clouds] losses, or null
    real *__restrict__ loss,  // [] sum of losses / parts, or null
    double parts
) {
    __shared__ u64 shared[OWNED > WARPS * STAGED ? OWNED : WARPS * STAGED];
    __shared__ Owned own_rows, own_columns;
    const int x_slots = slots_of(x_clouds), y_slots = slots_of(y_clouds);
    const int thread = blockIdx.x * THREADS + threadIdx.x, threads = gridDim.x * THREADS;
    u32 awaited = 0;
    if (*total > capacity) {  // NaN rather than an incomplete plan
        for (int side = 0; side < 2; ++side) {
            const Side &of = side ? y : x;
            for (int slot = thread; slot < (side ? y_slots : x_slots); slot += threads)
                if (of.gradient && of.rows[slot].index >= 0)
                    write_gradient(of.gradient, of.rows[slot].index, {0, NAN_DOUBLE, NAN_DOUBLE, NAN_DOUBLE}, 1);
        }
        for (int b = thread; each && b < x_clouds.count; b += threads) each[b] = NAN_FLOAT;
        if (loss && thread == 0) *loss = NAN_FLOAT;
        return;
    }
    // merge
    prefix_sums(x.first, x_slots, [&](int i) { return x.counts[i] + x.cursors[i]; }, of_blocks, arrived, awaited);
    wait_for_grid(arrived, awaited);
    list_longs(x, x_slots);
    each_slot(
        x_slots, [&](int i) { return x.counts[i]; },
        [&](int i, int lane, int lanes) {
            for (u32 e = lane; e < x.counts[i]; e += lanes) {
                const Entry entry = entries[x.starts[i] + e];
                plan.keys[x.first[i] + e] = (u64)entry.other << 32 | __float_as_uint(entry.weight) << 1;
            }
        }
    );
    each_slot(
        y_slots, [&](int j) { return y.counts[j]; },
        [&](int j, int lane, int lanes) {
            for (u32 e = lane; e < y.counts[j]; e += lanes) {
                const Entry entry = entries[y.starts[j] + e];
                const u32 i = entry.other, at = x.first[i] + x.counts[i] + atomicSub(&x.cursors[i], 1u) - 1;
                plan.keys[at] = (u64)(u32)j << 32 | __float_as_uint(entry.weight) << 1 | 1;
            }
            if (lane == 0) y.cursors[j] = y.first[j] = 0;
        }
    );
    wait_for_grid(arrived, awaited);
    sort_lines(x, x_slots, plan.keys, plan.spare, shared, [&](int i, int e, u64 key) {
        plan.keys[x.first[i] + e] = key;
    });
    wait_for_grid(arrived, awaited);
#if MINIMUM
    each_line(x, x_slots, [&](int i, int lane, int lanes) {
        for (u32 e = x.first[i] + lane; e < x.first[i + 1]; e += lanes)
            if (is_pair(plan.keys, e, x.first[i + 1])) atomicAdd(&y.first[column_of(plan.keys[e])], 1u);
    });
    wait_for_grid(arrived, awaited);
#endif
    each_line(x, x_slots, [&](int i, int lane, int lanes) {
        const u32 begin = x.first[i], end = x.first[i + 1];
        u32 to = begin;
#if MINIMUM
        bool has_pair = false;  // a row without pairs keeps its P1 entries, a column without pairs its P2 entries
        for (u32 e = begin + lane; e < end; e += lanes) has_pair |= is_pair(plan.keys, e, end);
        if (lanes > 1) has_pair = __any_sync(FULL, has_pair);
#endif
        for (u32 base = begin; base < end; base += lanes) {
            const u32 e = base + lane;
            const u64 key = e < end ? plan.keys[e] : 0;
            // The second entry of a pair is joined to the first.
            bool kept = e < end && !(e > begin && is_pair(plan.keys, e - 1, end));
            const bool pair = kept && is_pair(plan.keys, e, end);
            const float weight = weight_of(key), other = pair ? weight_of(plan.keys[e + 1]) : 0;
#if MINIMUM
            kept = kept && (pair || !(key & 1 ? y.first[column_of(key)] : has_pair));
            const float value = pair ? fminf(weight, other) : weight;
#else
            const float value = (weight + other) / 2;
#endif
            const u32 all = lanes > 1 ? __ballot_sync(FULL, kept) : kept, at = to + rank_in(all, lane);
            to += __popc(all);
            if (!kept) continue;
            plan.rows()[at] = Entry{column_of(key), value};
            plan.row[at] = i;
            atomicAdd(&y.cursors[column_of(key)], 1u);
        }
        if (lane == 0) plan.lengths[i] = to - begin;
        for (u32 e = to + lane; e < end; e += lanes) plan.row[e] = FULL;
    });
    wait_for_grid(arrived, awaited);

    // columns
    prefix_sums(y.first, y_slots, [&](int j) { return y.cursors[j]; }, of_blocks, arrived, awaited);
    wait_for_grid(arrived, awaited);
    list_longs(y, y_slots);
    each_line(x, x_slots, [&](int i, int lane, int lanes) {
        for (u32 e = x.first[i] + lane; e < x.first[i] + plan.lengths[i]; e += lanes) {
            const u32 j = plan.rows()[e].other;
            plan.place[y.first[j] + atomicSub(&y.cursors[j], 1u) - 1] = e;
        }
    });
    wait_for_grid(arrived, awaited);
    sort_lines(y, y_slots, plan.place, (u32 *)plan.keys, (u32 *)shared, [&](int j, int e, u32 place) {
        plan.place[y.first[j] + e] = place;
    });
    wait_for_grid(arrived, awaited);

    // Sinkhorn
    Entry *kept = (Entry *)shared;
    const Range rows = range_of(x_slots), columns = range_of(y_slots);
    for (int i = rows.begin + threadIdx.x; i < rows.end; i += THREADS) x.scale[i] = 1;
    for (int j = columns.begin + threadIdx.x; j < columns.end; j += THREADS) y.scale[j] = 1;
    if (columns.begin < columns.end)
        for (u32 e = y.first[columns.begin] + threadIdx.x; e < y.first[columns.end]; e += THREADS) {
            const u32 place = plan.place[e];
            plan.columns()[e] = Entry{plan.row[place], plan.rows()[place].weight};
        }
    __syncthreads();
    const u32 used = load_lines(
        own_rows, kept, 0, rows, [&](int i) { return x.first[i]; }, [&](int i) { return plan.lengths[i]; },
        [&](u32 e) { return plan.rows()[e]; }
    );
    u32 all = used;
    if (used <= OWNED)
        all = load_lines(
            own_columns, kept, used, columns, [&](int j) { return y.first[j]; }, [&](int j) { return width(y, j); },
            [&](u32 e) { return plan.columns()[e]; }
        );
    if (all > OWNED && threadIdx.x == 0) atomicAdd(&arrived[1], 1u);
    wait_for_grid(arrived, awaited);
    if (*(volatile u32 *)&arrived[1] == 0) {
        const auto at = [&](u32 e) { return kept[e]; };
        for (int iteration = 0; iteration < iterations; ++iteration) {
            each_line(own_rows, rows.end - rows.begin, [&](int i, int lane, int lanes) {
                rescale(&x.scale[rows.begin + i], y.scale, own_rows.begin[i], own_rows.end[i], lane, lanes, at);
            });
            wait_for_grid(arrived, awaited);
            each_line(own_columns, columns.end - columns.begin, [&](int j, int lane, int lanes) {
                rescale(
                    &y.scale[columns.begin + j], x.scale, own_columns.begin[j], own_columns.end[j], lane, lanes, at
                );
            });
            wait_for_grid(arrived, awaited);
        }
    } else {
        for (int iteration = 0; iteration < iterations; ++iteration) {
            each_line(x, x_slots, [&](int i, int lane, int lanes) {
                rescale(&x.scale[i], y.scale, x.first[i], x.first[i] + plan.lengths[i], lane, lanes, [&](u32 e) {
                    return plan.rows()[e];
                });
            });
            wait_for_grid(arrived, awaited);
            each_line(y, y_slots, [&](int j, int lane, int lanes) {
                rescale(&y.scale[j], x.scale, y.first[j], y.first[j + 1], lane, lanes, [&](u32 e) {
                    return plan.columns()[e];
                });
            });
            wait_for_grid(arrived, awaited);
        }
    }

    // loss
    each_line(x, x_slots, [&](int i, int lane, int lanes) {
        const Row point = x.rows[i];
        if (point.index < 0) {
            if (lane == 0) losses[i] = 0;
            return;
        }
        const Contribution contribution = contribution_of(
            point, x.scale[i], y.rows, y.scale, plan.rows(), x.first[i], x.first[i] + plan.lengths[i], lane, lanes,
            [&](u32 e, float value) { plan.rows()[e].weight = value; }
        );
        if (lane) return;
        losses[i] = contribution.loss;
        if (x.gradient) write_gradient(x.gradient, point.index, contribution, parts);
    });
    if (y.gradient)
        each_line(y, y_slots, [&](int j, int lane, int lanes) {
            const Row point = y.rows[j];
            if (point.index < 0) return;
            const Contribution contribution = contribution_of(
                point, y.scale[j], x.rows, x.scale, plan.columns(), y.first[j], y.first[j + 1], lane, lanes,
                [](u32, float) {}
            );
            if (lane == 0) write_gradient(y.gradient, point.index, contribution, parts);
        });
    wait_for_grid(arrived, awaited);
    const int x_nodes = tiles_of(x_clouds), nodes = x_nodes + tiles_of(y_clouds);
    for (int node = blockIdx.x * WARPS + (threadIdx.x >> 5); node < nodes; node += gridDim.x * WARPS) {
        const bool of_x = node < x_nodes;
        const Clouds &clouds = of_x ? x_clouds : y_clouds;
        const int number = of_x ? node : node - x_nodes, b = cloud_of<&Cloud::tile>(clouds, number);
        const int begin = rows_of(clouds)[b].slot + (number - rows_of(clouds)[b].tile) * NODE;
        const int end = min(begin + NODE, rows_of(clouds)[b + 1].slot);
        double sum = 0;
        for (int slot = begin + (threadIdx.x & 31); slot < end; slot += 32)
            if (of_x) sum += losses[slot];
            else if (y.rows[slot].index >= 0 && !is_finite(y.rows[slot])) sum = NAN_DOUBLE;
        sum = sum_of_warp(sum);
        if ((threadIdx.x & 31) == 0) (of_x ? x : y).sums[number] = sum;
    }
    wait_for_grid(arrived, awaited);
    for (int b = blockIdx.x * WARPS + (threadIdx.x >> 5); b < x_clouds.count; b += gridDim.x * WARPS) {
        double sum = 0;
        for (int side = 0; side < 2; ++side) {
            const Cloud *rows = rows_of(side ? y_clouds : x_clouds);
            const double *sums = side ? y.sums : x.sums;
            for (int node = rows[b].tile + (threadIdx.x & 31); node < rows[b + 1].tile; node += 32) sum += sums[node];
        }
        sum = sum_of_warp(sum);
        if (threadIdx.x & 31) continue;
        losses[b] = sum;
        if (each) each[b] = (real)sum;
    }
    if (!loss) return;
    wait_for_grid(arrived, awaited);
    if (blockIdx.x || threadIdx.x >= 32) return;
    double sum = 0;
    for (int b = threadIdx.x; b < x_clouds.count; b += 32) sum += losses[b];
    sum = sum_of_warp(sum);
    if (threadIdx.x == 0) *loss = (real)(sum / parts);
}
