// Joint selection on a CUDA device: the terms that a drawn chunk adds to every candidate left, tile
// by tile. Only a tile's sums are written to memory: at 163,840 candidates the matrix itself would
// be 100 GiB a model.
//
// A block of 8 warps has 128 candidates (rows) and one model in one direction. It goes through the
// drawn examples (columns) 128 at a time: a tile of dot products is made by the tensor cores in
// registers, turned into losses there and summed over its columns. Sums are taken in a fixed order
// by one block alone, so that the same inputs give the same bits.

// Candidates and drawn examples of a tile, and values of a row that are copied to shared memory at
// a time.
#define TILE 128
#define DEPTH 64
#define THREADS 256
#define SLAB_BYTES (TILE * DEPTH * 2)
// Warps side by side: a warp has 64 rows x 32 columns of a tile, in 4 x 4 products of 16 x 8.
#define WARPS_ACROSS 4
#define PRODUCTS 4
// A logit whose exponential is 0.
#define NOTHING -1e30f

// One model in one direction.
struct Slot {
    // The candidates' rows and the drawn examples', [B, stride] each. f32 values are the sum of a
    // half and of a second half over 2048, which lies `plane` values further on; where there are
    // only halves `plane` is 0.
    const f16* ours;
    const f16* theirs;
    u64 plane;
    // Values from one row to the next: a multiple of DEPTH, zeros at the end.
    u32 stride;
    // logit / ln 2 = (high + low) x dot + bias.
    float high, low, bias;
    // Of the loss in the score.
    double sign;
};

struct Job {
    Slot slots[4];
    // Indices of the candidates that are left, and of the drawn examples.
    const u32* rows;
    const u32* columns;
    u32 row_count, column_count;
    // B.
    u32 count;
    u32 slot_count;
    // By slot and candidate, [slots, B] each. Sigmoid: `sums` of softplus. Softmax: the sum of
    // exponentials of what logits are above `largest`, in units of ln 2. Largest logits: they are
    // in `largest`, and `sums` is 1. Where nothing was added yet `sums` is 0.
    double* largest;
    double* sums;
};

// A dot product is a sum over these pairs of planes: halves alone have the last one.
struct Term {
    u64 ours, theirs;
    float factor;
};

__device__ __forceinline__ Term term(const Slot& slot, u32 left) {
    if (left == 2) return {slot.plane, 0, 1.0f / 2048.0f};
    if (left == 1) return {0, slot.plane, 1.0f / 2048.0f};
    return {0, 0, 1.0f};
}

// Returns the place of 16 bytes of a slab's row. The exclusive or puts the same part of eight
// consecutive rows into different banks: without it `ldmatrix` would read all eight from the same
// banks, one after the other.
__device__ __forceinline__ u32 place(u32 row, u32 part) {
    return row * (DEPTH * sizeof(f16)) + ((part ^ (row & 7)) << 4);
}

// The slab that is copied or used next. The order is: tiles of columns, within a tile its terms,
// within a term the slabs of a row.
struct Cursor {
    u32 column, terms_left, slab;

    __device__ __forceinline__ void advance(const Slot& slot, u32 terms) {
        slab += 1;
        if (slab * DEPTH < slot.stride) return;
        slab = 0;
        if (terms_left > 0) {
            terms_left -= 1;
            return;
        }
        terms_left = terms - 1;
        column += TILE;
    }

    // Returns whether this is a tile's last slab.
    __device__ __forceinline__ bool ends_tile(const Slot& slot) const {
        return terms_left == 0 && (slab + 1) * DEPTH == slot.stride;
    }
};

// A block's shared memory: STAGES slabs of rows and of columns, and each row's sums by the warps
// side by side.
struct Shared {
    unsigned char* slabs;
    double* sums;
    float* largest;

    __device__ __forceinline__ explicit Shared(unsigned char* from)
        : slabs(from), sums(reinterpret_cast<double*>(from + STAGES * SLAB_BYTES * 2)),
          largest(reinterpret_cast<float*>(sums + WARPS_ACROSS * TILE)) {}

    __device__ __forceinline__ unsigned char* ours(u32 stage) const { return slabs + stage * SLAB_BYTES * 2; }
    __device__ __forceinline__ unsigned char* theirs(u32 stage) const { return ours(stage) + SLAB_BYTES; }
};

// Copies a slab of rows and one of columns; every thread takes one part of every 32nd row of each.
// Places beyond the last row or column get a copy of it, so that no address is out of range. Their
// results are masked (`valid`) or not stored.
struct Copier {
    const f16* ours[TILE / 32];
    u32 theirs[TILE / 32];
    u32 first, part;

    __device__ __forceinline__ Copier(const Job& job, const Slot& slot, u32 row) {
        first = threadIdx.x / 8;
        part = threadIdx.x % 8;
        for (u32 i = 0; i < TILE / 32; ++i) {
            u32 index = job.rows[min(row + first + 32 * i, job.row_count - 1)];
            ours[i] = slot.ours + static_cast<u64>(index) * slot.stride + part * 8;
            theirs[i] = 0;
        }
    }

    __device__ __forceinline__ void copy(const Job& job, const Slot& slot, const Cursor& at, const Shared& to, u32 stage) {
        if (at.column >= job.column_count) return;
        if (at.slab == 0) {
            for (u32 i = 0; i < TILE / 32; ++i) {
                theirs[i] = job.columns[min(at.column + first + 32 * i, job.column_count - 1)];
            }
        }
        Term planes = term(slot, at.terms_left);
        for (u32 i = 0; i < TILE / 32; ++i) {
            u32 to_part = place(first + 32 * i, part);
            copy_later(to.ours(stage) + to_part, ours[i] + planes.ours + at.slab * DEPTH);
            const f16* from = slot.theirs + planes.theirs + static_cast<u64>(theirs[i]) * slot.stride + part * 8;
            copy_later(to.theirs(stage) + to_part, from + at.slab * DEPTH);
        }
    }
};

// A warp's part of a tile, in registers.
//
// Tensor cores cut sums off instead of rounding them. Over a whole row that would pull large logits
// towards 0 by more than is promised, so each slab's products are summed apart, and added with
// rounding.
struct Products {
    float sums[PRODUCTS][PRODUCTS][4];

    __device__ __forceinline__ void clear() {
        #pragma unroll
        for (u32 k = 0; k < PRODUCTS * PRODUCTS * 4; ++k) (&sums[0][0][0])[k] = 0;
    }

    // Adds a slab's products times a factor: rows from `row` and columns from `column` of the tile.
    __device__ __forceinline__ void add(
        const unsigned char* ours, const unsigned char* theirs, u32 row, u32 column, float factor
    ) {
        u32 lane = threadIdx.x % 32;
        float slab[PRODUCTS][PRODUCTS][4] = {};
        #pragma unroll
        for (u32 part = 0; part < DEPTH / 8; part += 2) {
            u32 a[PRODUCTS][4], b[PRODUCTS / 2][4];
            #pragma unroll
            for (u32 m = 0; m < PRODUCTS; ++m) {
                load_matrices(a[m], ours + place(row + 16 * m + lane % 16, part + lane / 16));
            }
            #pragma unroll
            for (u32 n = 0; n < PRODUCTS / 2; ++n) {
                load_matrices(b[n], theirs + place(column + 16 * n + lane % 8 + lane / 16 * 8, part + lane / 8 % 2));
            }
            #pragma unroll
            for (u32 m = 0; m < PRODUCTS; ++m) {
                #pragma unroll
                for (u32 n = 0; n < PRODUCTS; ++n) {
                    const u32 half[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
                    multiply(slab[m][n], a[m], half);
                }
            }
        }
        #pragma unroll
        for (u32 k = 0; k < PRODUCTS * PRODUCTS * 4; ++k) {
            float& sum = (&sums[0][0][0])[k];
            sum = fmaf((&slab[0][0][0])[k], factor, sum);
        }
    }
};

// Logits in units of ln 2 of the eight columns that a thread has of a row: row l / 4 of a product
// (`half` 0) or the one 8 further down. Columns from `valid` on, counted from the warp's first, are
// NOTHING.
__device__ __forceinline__ void logits(
    float (&z)[2 * PRODUCTS], const float (&products)[PRODUCTS][4], u32 half, const Slot& slot, float bias, u32 valid
) {
    #pragma unroll
    for (u32 k = 0; k < 2 * PRODUCTS; ++k) {
        float dot = products[k / 2][2 * half + k % 2];
        u32 column = k / 2 * 8 + threadIdx.x % 4 * 2 + k % 2;
        z[k] = column < valid ? fmaf(dot, slot.high, fmaf(dot, slot.low, bias)) : NOTHING;
    }
}

// Adds the softplus of a row's logits to the sum at `sum`, once for the four lanes that share the
// row. The logarithms of 32 columns are one logarithm of a product, of which 1 less is kept: small
// factors are not lost.
__device__ __forceinline__ void add_softplus(const float (&z)[2 * PRODUCTS], double* sum) {
    float product = 0, positive = 0;
    #pragma unroll
    for (u32 k = 0; k < 2 * PRODUCTS; ++k) {
        positive += fmaxf(z[k], 0.0f);
        float small = exp2_fast(-fabsf(z[k]));
        product = fmaf(product, small, product + small);
    }
    double total = positive;
    #pragma unroll
    for (u32 step = 1; step < 4; step *= 2) {
        float other = __shfl_xor_sync(0xffffffffu, product, step);
        product = fmaf(product, other, product + other);
        total += __shfl_xor_sync(0xffffffffu, total, step);
    }
    if (threadIdx.x % 4 == 0) {
        *sum += total * 0.69314718055994530942 + static_cast<double>(log1pf(product));
    }
}

// The largest of a row's logits, for all of the four lanes that share the row.
__device__ __forceinline__ float largest_of(const float (&z)[2 * PRODUCTS]) {
    float most = z[0];
    #pragma unroll
    for (u32 k = 1; k < 2 * PRODUCTS; ++k) most = fmaxf(most, z[k]);
    #pragma unroll
    for (u32 step = 1; step < 4; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    return most;
}

// Adds the exponentials of a row's logits to the scaled sum at (`largest`, `sum`), as
// `add_softplus` does.
__device__ __forceinline__ void add_exponentials(const float (&z)[2 * PRODUCTS], float* largest, double* sum) {
    float most = largest_of(z);
    float total = 0;
    #pragma unroll
    for (u32 k = 0; k < 2 * PRODUCTS; ++k) total += exp2_fast(z[k] - most);
    #pragma unroll
    for (u32 step = 1; step < 4; step *= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    if (threadIdx.x % 4 == 0) {
        float before = *largest;
        float now = fmaxf(before, most);
        *sum = *sum * static_cast<double>(exp2_fast(before - now)) + static_cast<double>(total * exp2_fast(most - now));
        *largest = now;
    }
}

// Keeps the largest of a row's logits at `largest`.
__device__ __forceinline__ void keep_largest(const float (&z)[2 * PRODUCTS], float* largest) {
    float most = largest_of(z);
    if (threadIdx.x % 4 == 0) *largest = fmaxf(*largest, most);
}

// The reduction of a row's logits.
enum Form { SOFTPLUS, EXPONENTIALS, LARGEST };

// Adds the warp's part of a finished tile to its rows' sums. `column` is the warp's first of all.
template <Form FORM>
__device__ __forceinline__ void reduce(
    const Products& products, const Job& job, const Slot& slot, const Shared& to, u32 row, u32 across, u32 column
) {
    u32 valid = job.column_count - column;
    float bias = FORM == SOFTPLUS ? slot.bias : 0.0f;
    #pragma unroll
    for (u32 m = 0; m < PRODUCTS; ++m) {
        #pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float z[2 * PRODUCTS];
            logits(z, products.sums[m], half, slot, bias, valid);
            u32 at = across * TILE + row + 16 * m + 8 * half + threadIdx.x % 32 / 4;
            if (FORM == SOFTPLUS) add_softplus(z, to.sums + at);
            if (FORM == EXPONENTIALS) add_exponentials(z, to.largest + at, to.sums + at);
            if (FORM == LARGEST) keep_largest(z, to.largest + at);
        }
    }
}

// Adds a block's sums of its row `threadIdx.x` to the candidate's running sums, the warps' parts in
// a fixed order. Atomic additions from several blocks would be faster to write, but their order,
// and so the last bits of a score and perhaps the draw, would change from run to run.
template <Form FORM> __device__ __forceinline__ void keep(const Job& job, const Shared& from, u32 first_row) {
    u32 row = threadIdx.x;
    if (row >= TILE || first_row + row >= job.row_count) return;
    u64 at = static_cast<u64>(blockIdx.y) * job.count + job.rows[first_row + row];
    double sum = job.sums[at];
    if (FORM == SOFTPLUS) {
        for (u32 across = 0; across < WARPS_ACROSS; ++across) sum += from.sums[across * TILE + row];
        job.sums[at] = sum;
        return;
    }
    double largest = sum == 0.0 ? static_cast<double>(NOTHING) : job.largest[at];
    for (u32 across = 0; across < WARPS_ACROSS; ++across) {
        double part = from.sums[across * TILE + row], most = from.largest[across * TILE + row];
        if (FORM == LARGEST) {
            sum = 1.0, largest = fmax(largest, most);
            continue;
        }
        if (part == 0.0) continue;
        double now = fmax(largest, most);
        sum = sum * exp2(largest - now) + part * exp2(most - now);
        largest = now;
    }
    job.sums[at] = sum;
    job.largest[at] = largest;
}

// One block: rows from blockIdx.x x TILE, slot blockIdx.y.
template <Form FORM> __device__ __forceinline__ void pairs(const Job& job) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    const Shared shared(shared_memory);
    const Slot& slot = job.slots[blockIdx.y];
    u32 first_row = blockIdx.x * TILE, warp = threadIdx.x / 32;
    u32 across = warp % WARPS_ACROSS, row = warp / WARPS_ACROSS * 64, column = across * 32;
    for (u32 k = threadIdx.x; k < WARPS_ACROSS * TILE; k += THREADS) shared.sums[k] = 0, shared.largest[k] = NOTHING;

    u32 terms = slot.plane == 0 ? 1 : 3;
    Copier copier(job, slot, first_row);
    Cursor copied{0, terms - 1, 0}, at = copied;
    for (u32 stage = 0; stage < STAGES - 1; ++stage) {
        copier.copy(job, slot, copied, shared, stage);
        copied.advance(slot, terms);
        end_copies();
    }
    Products products;
    products.clear();
    for (u32 stage = 0; at.column < job.column_count; stage = (stage + 1) % STAGES) {
        wait_for_copies<STAGES - 2>();
        // After this barrier the slab is there for all threads (each thread waits only for its own
        // copies), and all threads are done with the slab before, whose place the next copy
        // overwrites.
        __syncthreads();
        copier.copy(job, slot, copied, shared, (stage + STAGES - 1) % STAGES);
        copied.advance(slot, terms);
        end_copies();
        if (first_row + row < job.row_count && at.column + column < job.column_count) {
            products.add(shared.ours(stage), shared.theirs(stage), row, column, term(slot, at.terms_left).factor);
            if (at.ends_tile(slot)) {
                reduce<FORM>(products, job, slot, shared, row, across, at.column + column);
                products.clear();
            }
        }
        at.advance(slot, terms);
    }
    __syncthreads();
    keep<FORM>(job, shared, first_row);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) softplus_sums(const __grid_constant__ Job job) {
    pairs<SOFTPLUS>(job);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) exponential_sums(const __grid_constant__ Job job) {
    pairs<EXPONENTIALS>(job);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) largest_logits(const __grid_constant__ Job job) {
    pairs<LARGEST>(job);
}

// Writes what was added to the scores of the candidates in `rows`, by their place there.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    added(const __grid_constant__ Job job, u32 softmax, double* out) {
    u32 k = blockIdx.x * THREADS + threadIdx.x;
    if (k >= job.row_count) return;
    double total = 0;
    for (u32 s = 0; s < job.slot_count; ++s) {
        u64 at = static_cast<u64>(s) * job.count + job.rows[k];
        double sum = job.sums[at];
        if (softmax == 0) {
            total += job.slots[s].sign * sum;
        } else if (sum != 0.0) {
            total += 0.5 * job.slots[s].sign * (job.largest[at] * 0.69314718055994530942 + log(sum));
        }
    }
    out[k] = total;
}

// f32 values as two halves: `rows` rows of `dim` to rows of `stride`, zeros at the end.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    split(const float* from, f16* to, u64 plane, u32 rows, u32 dim, u32 stride) {
    u64 k = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x;
    if (k >= static_cast<u64>(rows) * stride) return;
    u32 row = static_cast<u32>(k / stride), column = static_cast<u32>(k % stride);
    float value = column < dim ? from[static_cast<u64>(row) * dim + column] : 0.0f;
    f16 leading = to_half(value);
    to[k] = leading;
    to[plane + k] = to_half((value - from_half(leading)) * 2048.0f);
}
