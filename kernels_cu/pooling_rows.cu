// SPDX-License-Identifier: Apache-2.0
// In-bucket pooling, second half: rows of features along `members`, which pooling_group.cu wrote.
//   pool_sums        child = sum or mean of its members                                     (bucket_pool)
//   pool_extremes    child = minimum or maximum of its members                              (bucket_pool)
//   spread_sums      member = the child's gradient or its share of it                       (bucket_pool_backward)
//   spread_extremes  member = the child's gradient if its value came from there, else 0     (bucket_pool_backward)
//   unpool_rows      member = child + skip                                                  (bucket_unpool)
//   unpool_sums      child = sum of its members, skip = member                              (bucket_unpool_backward)
//
// Memory bandwidth limits all of them. Each row is read once and written once, one word a thread, neighbouring threads
// along a row. Sums are float32, in the order of the members, and rounded once, so the CPU gets the same bits. The
// parent's padding belongs to no child. Cloud::group counts it: row j of a batch's padding lies in the cloud whose
// range of groups contains j.

#ifndef ELEMENT
#define ELEMENT 3  // 0 float32, 2 float16, 3 bfloat16
#endif
#ifndef WORD
#define WORD 16  // bytes a load: the largest power of two up to 16 that divides a row and its addresses
#endif
#ifndef RATIO
#define RATIO 2  // members of a child: 2, 4 or 8
#endif
#define THREADS 256           // mirrored by gpu3d/cuda/pooling.py, like the next
#define LOADS 8               // words that a thread loads at once
#define ROWS (LOADS / RATIO)  // children a thread

#include "clouds.cuh"
#include "early.cuh"
#include "floats.cuh"

typedef Float<ELEMENT>::Stored element_t;
__device__ __forceinline__ float widen(element_t x) { return Float<ELEMENT>::widen(x); }
__device__ __forceinline__ element_t narrow(float x) { return Float<ELEMENT>::narrow(x); }

#define PER (WORD / (int)sizeof(element_t))  // elements a word
struct __align__(WORD) Word {
    element_t x[PER];
};
struct __align__(PER) Places {
    u8 x[PER];
};  // of argmember
struct Floats {
    float x[PER];
};

__device__ __forceinline__ Floats widen(const Word &word) {
    Floats out;
#pragma unroll
    for (int e = 0; e < PER; ++e) out.x[e] = widen(word.x[e]);
    return out;
}

__device__ __forceinline__ Word narrow(const Floats &values) {
    Word out;
#pragma unroll
    for (int e = 0; e < PER; ++e) out.x[e] = narrow(values.x[e]);
    return out;
}

// x / count, correctly rounded. If count is a power of two, as for all groups except a cloud's last, a product gives
// the same.
__device__ __forceinline__ void divide(Floats &values, int count) {
    if ((count & count - 1) == 0) {
        const float share = 1.0f / count;
#pragma unroll
        for (int e = 0; e < PER; ++e) values.x[e] *= share;
    } else {
#pragma unroll
        for (int e = 0; e < PER; ++e) values.x[e] = __fdiv_rn(values.x[e], count);
    }
}

// ---- threads, members, children ------------------------------------------------------------------------------------

struct __align__(RATIO < 4 ? 8 : 16) Members {
    int slot[RATIO];  // -1 if there is none; then all later ones are -1 too
    __device__ __forceinline__ int count() const {
        int n = 0;
#pragma unroll
        for (int m = 0; m < RATIO; ++m) n += slot[m] >= 0;
        return n;
    }
};

// 1 << lane_bits neighbouring threads share a row. A thread takes ROWS rows and every (1 << lane_bits)-th word of each.
struct Part {
    long long row, step;
    int column, columns;
};

__device__ __forceinline__ Part part_of_thread(int lane_bits) {
    const int rows_a_step = THREADS >> lane_bits;
    return {
        (long long)blockIdx.x * rows_a_step * ROWS + (threadIdx.x >> lane_bits), rows_a_step,
        (int)(threadIdx.x & (1 << lane_bits) - 1), 1 << lane_bits
    };
}

__device__ __forceinline__ void load_members(
    Members its[ROWS], const Part &part, const Members *members, long long children
) {
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        const long long row = part.row + k * part.step;
        if (row < children) its[k] = members[row];
        else
#pragma unroll
            for (int m = 0; m < RATIO; ++m) its[k].slot[m] = -1;
    }
}

// Loads the members' words of column c.
__device__ __forceinline__ void load_words(
    Word words[ROWS][RATIO], const Members its[ROWS], const Word *rows, long long stride, long long c
) {
#pragma unroll
    for (int k = 0; k < ROWS; ++k)
#pragma unroll
        for (int m = 0; m < RATIO; ++m)
            if (its[k].slot[m] >= 0) words[k][m] = rows[its[k].slot[m] * stride + c];
}

// Loads the children's words of column c.
template <class T>
__device__ __forceinline__ void load_children(
    T words[ROWS], const Members its[ROWS], const Part &part, const T *rows, long long stride, long long c
) {
#pragma unroll
    for (int k = 0; k < ROWS; ++k)
        if (its[k].slot[0] >= 0) words[k] = rows[(part.row + k * part.step) * stride + c];
}

// The sum of the members' words of a child; 0 if it has no member.
__device__ __forceinline__ Floats sum_of(const Word words[RATIO], const Members &its) {
    Floats sum = {};
#pragma unroll
    for (int m = 0; m < RATIO; ++m)
        if (its.slot[m] >= 0) {
            const Floats x = widen(words[m]);
#pragma unroll
            for (int e = 0; e < PER; ++e) sum.x[e] = m ? sum.x[e] + x.x[e] : x.x[e];
        }
    return sum;
}

// Clears the parent's padding. Its rows follow the children in the grid.
__device__ __forceinline__ void clear_padding(
    const Part &part, const Clouds &parents, long long children, Word *rows, long long words
) {
    const int padding = groups_of(parents);
    for (int k = 0; k < ROWS; ++k) {
        const long long row = part.row + k * part.step - children;
        if (row < 0 || row >= padding) continue;
        const int b = cloud_of<&Cloud::group>(parents, row);
        const Cloud cloud = rows_of(parents)[b], next = rows_of(parents)[b + 1];
        const long long slot = cloud.slot + (next.point - cloud.point) + (row - cloud.group);
        for (long long c = part.column; c < words; c += part.columns) rows[slot * words + c] = {};
    }
}

// ---- kernels -------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS) void pool_sums(
    const Word *features,  // [parent slots, words], rows `stride` words apart
    long long stride,
    const Members *members,  // [children]; children include padding slots
    long long children,
    long long words,
    int lane_bits,
    int mean,               // 1: divide by the number of members
    Word *__restrict__ out  // [children, words]
) {
    start_early();
    const Part part = part_of_thread(lane_bits);
    Members its[ROWS];
    load_members(its, part, members, children);
    for (long long c = part.column; c < words; c += part.columns) {
        Word loaded[ROWS][RATIO];
        load_words(loaded, its, features, stride, c);
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const long long row = part.row + k * part.step;
            if (row >= children) continue;
            Floats sum = sum_of(loaded[k], its[k]);
            if (mean && its[k].slot[0] >= 0) divide(sum, its[k].count());
            out[row * words + c] = narrow(sum);
        }
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void pool_extremes(
    const Word *features,  // [parent slots, words], rows `stride` words apart
    long long stride,
    const Members *members,  // [children]; children include padding slots
    long long children,
    long long words,
    int lane_bits,
    int largest,                    // 1: max, 0: min
    Word *__restrict__ out,         // [children, words]
    Places *__restrict__ argmember  // [children, words]
) {
    start_early();
    const Part part = part_of_thread(lane_bits);
    Members its[ROWS];
    load_members(its, part, members, children);
    for (long long c = part.column; c < words; c += part.columns) {
        Word loaded[ROWS][RATIO];
        load_words(loaded, its, features, stride, c);
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const long long row = part.row + k * part.step;
            if (row >= children) continue;
            Floats best = {};
            Places place = {};
#pragma unroll
            for (int m = 0; m < RATIO; ++m)
                if (its[k].slot[m] >= 0) {
                    const Floats x = widen(loaded[k][m]);
#pragma unroll
                    for (int e = 0; e < PER; ++e) {
                        const bool holds = largest ? best.x[e] >= x.x[e] : best.x[e] <= x.x[e];
                        // The first of equal values wins, and NaN wins over numbers.
                        if (m == 0 || !(holds || best.x[e] != best.x[e])) {
                            best.x[e] = x.x[e];
                            place.x[e] = m;
                        }
                    }
                }
            out[row * words + c] = narrow(best);
            argmember[row * words + c] = place;
        }
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void spread_sums(
    const Word *__restrict__ dchild,  // [children, words], rows `stride` words apart
    long long stride,
    const Members *__restrict__ members,  // [children]; children include padding slots
    long long children,
    const __grid_constant__ Clouds parents,
    long long words,
    int lane_bits,
    int mean,                     // 1: each member gets its share
    Word *__restrict__ dfeatures  // [parent slots, words]
) {
    const Part part = part_of_thread(lane_bits);
    Members its[ROWS];
    load_members(its, part, members, children);
    for (long long c = part.column; c < words; c += part.columns) {
        Word rows[ROWS];
        load_children(rows, its, part, dchild, stride, c);
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            if (its[k].slot[0] < 0) continue;
            if (mean) {
                Floats share = widen(rows[k]);
                divide(share, its[k].count());
                rows[k] = narrow(share);
            }
#pragma unroll
            for (int m = 0; m < RATIO; ++m)
                if (its[k].slot[m] >= 0) dfeatures[its[k].slot[m] * words + c] = rows[k];
        }
    }
    clear_padding(part, parents, children, dfeatures, words);
}

extern "C" __global__ __launch_bounds__(THREADS) void spread_extremes(
    const Word *__restrict__ dchild,  // [children, words], rows `stride` words apart
    long long stride,
    const Places *__restrict__ argmember,  // [children, words]
    const Members *__restrict__ members,   // [children]; children include padding slots
    long long children,
    const __grid_constant__ Clouds parents,
    long long words,
    int lane_bits,
    Word *__restrict__ dfeatures  // [parent slots, words]
) {
    const Part part = part_of_thread(lane_bits);
    Members its[ROWS];
    load_members(its, part, members, children);
    for (long long c = part.column; c < words; c += part.columns) {
        Word rows[ROWS];
        Places place[ROWS];
        load_children(rows, its, part, dchild, stride, c);
        load_children(place, its, part, argmember, words, c);
#pragma unroll
        for (int k = 0; k < ROWS; ++k)
#pragma unroll
            for (int m = 0; m < RATIO; ++m) {
                if (its[k].slot[m] < 0) continue;
                Word out;
#pragma unroll
                for (int e = 0; e < PER; ++e) out.x[e] = place[k].x[e] == m ? rows[k].x[e] : (element_t)0;
                dfeatures[its[k].slot[m] * words + c] = out;
            }
    }
    clear_padding(part, parents, children, dfeatures, words);
}

extern "C" __global__ __launch_bounds__(THREADS) void unpool_rows(
    const Word *child,  // [children, words], rows `child_stride` words apart
    long long child_stride,
    const Word *skip,  // [parent slots, words], rows `skip_stride` words apart, or null
    long long skip_stride,
    const Members *members,  // [children]; children include padding slots
    long long children,
    const __grid_constant__ Clouds parents,
    long long words,
    int lane_bits,
    Word *__restrict__ out  // [parent slots, words]
) {
    start_early();
    const Part part = part_of_thread(lane_bits);
    Members its[ROWS];
    load_members(its, part, members, children);
    for (long long c = part.column; c < words; c += part.columns) {
        Word rows[ROWS], skipped[ROWS][RATIO];
        if (skip) load_words(skipped, its, skip, skip_stride, c);
        load_children(rows, its, part, child, child_stride, c);
#pragma unroll
        for (int k = 0; k < ROWS; ++k)
#pragma unroll
            for (int m = 0; m < RATIO; ++m) {
                if (its[k].slot[m] < 0) continue;
                Word sum = rows[k];
                if (skip) {
                    Floats x = widen(rows[k]);
                    const Floats y = widen(skipped[k][m]);
#pragma unroll
                    for (int e = 0; e < PER; ++e) x.x[e] += y.x[e];
                    sum = narrow(x);
                }
                out[its[k].slot[m] * words + c] = sum;
            }
    }
    clear_padding(part, parents, children, out, words);
}

extern "C" __global__ __launch_bounds__(THREADS) void unpool_sums(
    const Word *__restrict__ dout,  // [parent slots, words], rows `stride` words apart
    long long stride,
    const Members *__restrict__ members,  // [children]; children include padding slots
    long long children,
    const __grid_constant__ Clouds parents,
    long long words,
    int lane_bits,
    Word *__restrict__ dchild,  // [children, words]
    Word *__restrict__ dskip    // [parent slots, words]
) {
    const Part part = part_of_thread(lane_bits);
    Members its[ROWS];
    load_members(its, part, members, children);
    for (long long c = part.column; c < words; c += part.columns) {
        Word loaded[ROWS][RATIO];
        load_words(loaded, its, dout, stride, c);
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const long long row = part.row + k * part.step;
            if (row >= children) continue;
            dchild[row * words + c] = narrow(sum_of(loaded[k], its[k]));
#pragma unroll
            for (int m = 0; m < RATIO; ++m)
                if (its[k].slot[m] >= 0) dskip[its[k].slot[m] * words + c] = loaded[k][m];
        }
    }
    clear_padding(part, parents, children, dskip, words);
}
