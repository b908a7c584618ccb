// Operations of a warp's lanes together: shuffles, votes, matches, reductions and the matrix instructions.
// Each lane brings its operands to a rendezvous; the last one to come computes for all.
#pragma once
#include "arithmetic.h"
#include "memory.h"

namespace emu {

// ---- shuffles ----
enum class ShuffleMode : u8 { kUp, kDown, kButterfly, kIndex };
struct Shuffled {
    u32 value;
    bool valid;
};

template <ShuffleMode M>
EMU_HIDDEN Shuffled shuffle(u32 line, u32 value, u32 b, u32 c, u32 mask) {
    struct Lane {
        u32 value, b, c, lane, result;
        bool valid, absent;
    } operand{value, b, c, self->lane, 0, false, false};
    rendezvous(
        line, "shfl.sync", mask, &operand,
        [](void* const* lanes, u32 mask) EMU_UNSEEN {
            for (u32 i = 0; i < 32; ++i) {
                if (!(mask >> i & 1)) continue;
                Lane& lane = *static_cast<Lane*>(lanes[i]);
                const u32 offset = lane.b & 31, clamp = lane.c & 31, segment = lane.c >> 8 & 31;
                const u32 last = (i & segment) | (clamp & ~segment), first = i & segment;
                u32 source = 0;
                switch (M) {
                    case ShuffleMode::kUp:
                        source = i - offset;
                        lane.valid = static_cast<s32>(source) >= static_cast<s32>(last);
                        break;
                    case ShuffleMode::kDown:
                        source = i + offset;
                        lane.valid = source <= last;
                        break;
                    case ShuffleMode::kButterfly:
                        source = i ^ offset;
                        lane.valid = source <= last;
                        break;
                    case ShuffleMode::kIndex:
                        source = first | (offset & ~segment);
                        lane.valid = source <= last;
                        break;
                }
                if (!lane.valid) source = i;
                lane.absent = !(mask >> source & 1);
                lane.b = source;
                if (!lane.absent) lane.result = static_cast<const Lane*>(lanes[source])->value;
            }
        },
        /*absent_allowed=*/false, /*any_line=*/false, /*synchronizes=*/false);
    if (operand.absent)
        fault("absent-lane", line, "shfl.sync reads lane %u, which its mask %#010x does not name", operand.b,
              mask);
    return {operand.result, operand.valid};
}

// ---- votes, matches, reductions ----
EMU_HIDDEN u32 ballot(u32 line, const char* kind, bool predicate, u32 mask) {
    struct Lane {
        u32 predicate, result;
    } operand{predicate, 0};
    rendezvous(
        line, kind, mask, &operand,
        [](void* const* lanes, u32 mask) EMU_UNSEEN {
            u32 votes = 0;
            for (u32 i = 0; i < 32; ++i)
                if (mask >> i & 1) votes |= static_cast<Lane*>(lanes[i])->predicate << i;
            for (u32 i = 0; i < 32; ++i)
                if (mask >> i & 1) static_cast<Lane*>(lanes[i])->result = votes;
        },
        /*absent_allowed=*/true, /*any_line=*/false, /*synchronizes=*/false);
    return operand.result;
}
// The named lanes that are there: exited ones take no part in a vote.
EMU_HIDDEN u32 present(u32 line, const char* kind, u32 mask) { return ballot(line, kind, true, mask); }

EMU_HIDDEN bool vote_all(u32 line, bool predicate, u32 mask) {
    return ballot(line, "vote.sync.all", !predicate, mask) == 0;
}
EMU_HIDDEN bool vote_any(u32 line, bool predicate, u32 mask) {
    return ballot(line, "vote.sync.any", predicate, mask) != 0;
}
EMU_HIDDEN bool vote_uniform(u32 line, bool predicate, u32 mask) {
    struct Lane {
        bool predicate, result;
    } operand{predicate, false};
    rendezvous(
        line, "vote.sync.uni", mask, &operand,
        [](void* const* lanes, u32 mask) EMU_UNSEEN {
            bool yes = false, no = false;
            for (u32 i = 0; i < 32; ++i)
                if (mask >> i & 1) (static_cast<Lane*>(lanes[i])->predicate ? yes : no) = true;
            for (u32 i = 0; i < 32; ++i)
                if (mask >> i & 1) static_cast<Lane*>(lanes[i])->result = !(yes && no);
        },
        /*absent_allowed=*/true, /*any_line=*/false, /*synchronizes=*/false);
    return operand.result;
}

struct Matched {
    u32 mask;
    bool all;
};
EMU_HIDDEN Matched match(u32 line, u64 value, u32 mask) {
    struct Lane {
        u64 value;
        u32 equal;
        bool all;
    } operand{value, 0, false};
    rendezvous(
        line, "match.sync", mask, &operand,
        [](void* const* lanes, u32 mask) EMU_UNSEEN {
            for (u32 i = 0; i < 32; ++i) {
                if (!(mask >> i & 1)) continue;
                Lane& lane = *static_cast<Lane*>(lanes[i]);
                for (u32 j = 0; j < 32; ++j)
                    if ((mask >> j & 1) && static_cast<Lane*>(lanes[j])->value == lane.value)
                        lane.equal |= 1u << j;
                lane.all = lane.equal == mask;
            }
        },
        /*absent_allowed=*/true, /*any_line=*/false, /*synchronizes=*/false);
    return {operand.equal, operand.all};
}

template <class Op>
EMU_HIDDEN u32 reduce(u32 line, u32 value, u32 mask, Op) {
    struct Lane {
        u32 value, result;
    } operand{value, 0};
    rendezvous(
        line, "redux.sync", mask, &operand,
        [](void* const* lanes, u32 mask) EMU_UNSEEN {
            u32 total = 0;
            bool first = true;
            for (u32 i = 0; i < 32; ++i) {
                if (!(mask >> i & 1)) continue;
                const u32 x = static_cast<Lane*>(lanes[i])->value;
                total = first ? x : Op{}(total, x);
                first = false;
            }
            for (u32 i = 0; i < 32; ++i)
                if (mask >> i & 1) static_cast<Lane*>(lanes[i])->result = total;
        },
        /*absent_allowed=*/true, /*any_line=*/false, /*synchronizes=*/false);
    return operand.result;
}

EMU_HIDDEN void sync_warp(u32 line, u32 mask) {
    rendezvous(line, "bar.warp.sync", mask, nullptr, nullptr, /*absent_allowed=*/true, /*any_line=*/true,
               /*synchronizes=*/true);
}

// ---- matrices ----
// The rows that lanes bring or take, 16 bytes each: matrix m's row r belongs to lane 8m + r; thread t holds
// elements (t / 4, 2 (t % 4)) and the next one of each 8x8 matrix, packed in a word.
struct MatrixLane {
    u16 row[8];
    u32 words[4];
};
EMU_HIDDEN void clear_lane(MatrixLane& lane) { lane = MatrixLane{}; }

EMU_HIDDEN u32& fragment(void* const* lanes, u32 lane, u32 matrix) {
    return static_cast<MatrixLane*>(lanes[lane])->words[matrix];
}
EMU_HIDDEN u16& element(void* const* lanes, u32 matrix, u32 row, u32 column) {
    return static_cast<MatrixLane*>(lanes[8 * matrix + row])->row[column];
}
template <int N, bool Transposed>
EMU_HIDDEN void distribute(void* const* lanes, u32) {
    for (u32 m = 0; m < N; ++m)
        for (u32 t = 0; t < 32; ++t) {
            const u32 i = t / 4, j = 2 * (t % 4);
            const u32 low = Transposed ? element(lanes, m, j, i) : element(lanes, m, i, j);
            const u32 high = Transposed ? element(lanes, m, j + 1, i) : element(lanes, m, i, j + 1);
            fragment(lanes, t, m) = low | high << 16;
        }
}
template <int N, bool Transposed>
EMU_HIDDEN void collect(void* const* lanes, u32) {
    for (u32 m = 0; m < N; ++m)
        for (u32 t = 0; t < 32; ++t) {
            const u32 i = t / 4, j = 2 * (t % 4), word = fragment(lanes, t, m);
            (Transposed ? element(lanes, m, j, i) : element(lanes, m, i, j)) = static_cast<u16>(word);
            (Transposed ? element(lanes, m, j + 1, i) : element(lanes, m, i, j + 1)) =
                static_cast<u16>(word >> 16);
        }
}

template <int N, bool Transposed>
EMU_HIDDEN void exchange_rows(u32 line, Vec<u64, 2> row) {
    MatrixLane lane{};
    std::memcpy(lane.row, &row, sizeof row);
    rendezvous(line, "ldmatrix", ~0u, &lane, distribute<N, Transposed>, false, false, false);
    for (u32 m = 0; m < N; ++m) self->result[m] = lane.words[m];
}
template <int N, bool Transposed>
EMU_HIDDEN Vec<u64, 2> exchange_words(u32 line, u32 a, u32 b, u32 c, u32 d) {
    MatrixLane lane{{}, {a, b, c, d}};
    rendezvous(line, "stmatrix", ~0u, &lane, collect<N, Transposed>, false, false, false);
    Vec<u64, 2> row;
    std::memcpy(&row, lane.row, sizeof row);
    return row;
}
EMU_HIDDEN u64 result(u32 index) { return self->result[index]; }

// Each lane reads (writes) its own row, so that the checks name the lane whose address is wrong.
template <int N, bool Transposed, Space S>
EMU_INLINE void load_matrix(Site& site, u64 address) {
    Vec<u64, 2> row{};
    if (self->lane < 8 * N) {
        const u64 host = locate<S, Access::kRead, 16>(site, address);
        row.x[0] = *reinterpret_cast<const u64*>(host);
        row.x[1] = *reinterpret_cast<const u64*>(host + 8);
    }
    exchange_rows<N, Transposed>(site.line, row);
}
template <int N, bool Transposed, Space S>
EMU_INLINE void store_matrix(Site& site, u64 address, u32 a, u32 b, u32 c, u32 d) {
    const Vec<u64, 2> row = exchange_words<N, Transposed>(site.line, a, b, c, d);
    if (self->lane < 8 * N) {
        const u64 host = locate<S, Access::kWrite, 16>(site, address);
        *reinterpret_cast<u64*>(host) = row.x[0];
        *reinterpret_cast<u64*>(host + 8) = row.x[1];
    }
}
EMU_HIDDEN u32 transpose_matrix(u32 line, u32 word) {
    MatrixLane lane{{}, {word, 0, 0, 0}};
    rendezvous(
        line, "movmatrix", ~0u, &lane,
        [](void* const* lanes, u32 mask) EMU_UNSEEN {
            collect<1, false>(lanes, mask);
            distribute<1, true>(lanes, mask);
        },
        false, false, false);
    return lane.words[0];
}

// mma.sync m16n8kK: D = A B + C. Registers hold `Per` elements of A and B each; the layouts are those of the
// PTX manual: with g = lane / 4 and q = lane % 4, register r of A holds row g + 8 (r & 1), columns Per q + i
// + 4 Per (r >> 1), register r of B holds the same columns (as rows) + 4 Per r of column g; C and D hold row
// g + 8 (i >> 1), column 2 q + (i & 1). m16n8k8 of 16-bit types and m16n8k4 of tf32 are the same with half
// the registers.
struct MmaLane {
    u32 a[4], b[2], c[4], d[4];
};

template <class T>
EMU_HIDDEN double matrix_element(u32 word, u32 index) {
    if constexpr (std::is_same_v<T, tf32>)
        return as_float(word & 0xffffe000u);
    else if constexpr (std::is_integral_v<T>)
        return static_cast<double>(static_cast<T>(word >> (8 * index)));
    else
        return widen<T>(static_cast<typename T::Word>(word >> (8 * sizeof(typename T::Word) * index)));
}

template <class A, class B, class C, class D, int K, int Per>
EMU_HIDDEN void multiply(void* const* lanes, u32) {
    double a[16][K], b[K][8], c[16][8];
    constexpr u32 kRegisters = K / (4 * Per);  // of B; A has twice as many
    for (u32 t = 0; t < 32; ++t) {
        const MmaLane& lane = *static_cast<MmaLane*>(lanes[t]);
        const u32 g = t / 4, q = t % 4;
        for (u32 i = 0; i < Per; ++i) {
            for (u32 r = 0; r < 2 * kRegisters; ++r)
                a[g + 8 * (r & 1)][Per * q + i + 4 * Per * (r >> 1)] = matrix_element<A>(lane.a[r], i);
            for (u32 r = 0; r < kRegisters; ++r)
                b[Per * q + i + 4 * Per * r][g] = matrix_element<B>(lane.b[r], i);
        }
        for (u32 i = 0; i < 4; ++i) {
            double& sum = c[g + 8 * (i >> 1)][2 * q + (i & 1)];
            if constexpr (std::is_same_v<C, s32>)
                sum = static_cast<s32>(lane.c[i]);
            else if constexpr (std::is_same_v<C, f16>)
                sum = widen<f16>(static_cast<u16>(lane.c[i / 2] >> (16 * (i & 1))));
            else
                sum = as_float(lane.c[i]);
        }
    }
    for (u32 t = 0; t < 32; ++t) {
        MmaLane& lane = *static_cast<MmaLane*>(lanes[t]);
        for (u32 i = 0; i < 4; ++i) {
            const u32 row = t / 4 + 8 * (i >> 1), column = 2 * (t % 4) + (i & 1);
            double sum = c[row][column];
            for (u32 k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
            if constexpr (std::is_same_v<D, s32>) {
                lane.d[i] = static_cast<u32>(static_cast<s64>(sum));
            } else if constexpr (std::is_same_v<D, f16>) {
                if (i % 2 == 0) lane.d[i / 2] = 0;
                lane.d[i / 2] |= static_cast<u32>(narrow<f16>(sum)) << (16 * (i & 1));
            } else {
                lane.d[i] = word_of(static_cast<float>(sum));
            }
        }
    }
}

template <class A, class B, class C, class D, int K, int Per>
EMU_HIDDEN void mma(u32 line, Vec<u32, 4> a, Vec<u32, 2> b, Vec<u32, 4> c) {
    MmaLane lane{{a.x[0], a.x[1], a.x[2], a.x[3]}, {b.x[0], b.x[1]}, {c.x[0], c.x[1], c.x[2], c.x[3]}, {}};
    rendezvous(line, "mma.sync", ~0u, &lane, multiply<A, B, C, D, K, Per>, false, false, false);
    for (u32 i = 0; i < 4; ++i) self->result[i] = lane.d[i];
}

}  // namespace emu
