/* What a token takes of a Llama-shaped model: y = W x + b + B A x for a few rows x, attention, norms.

   W is float32, bfloat16 or int8, the rest float32. Each row's numbers are added up in one order, whoever is beside it
   and on however many threads. Compiled on the user's machine where there is a compiler, see native.py: for AVX-512, or
   for AVX2, which has no products of fewer bits here. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifdef __AVX512F__
#define LANES 16 /* numbers of a vector */
#define ROWS 8   /* whose sums lie in registers, with BLOCKS vectors for each */
#else
#define LANES 8
#define ROWS 4
#endif
#define BLOCKS 3
#define OUTPUTS (BLOCKS * LANES) /* that are computed together */
#define DEPTH 1024               /* inputs that are laid out together: they stay in a core's cache */
#define PART 128                 /* the second part of a number in 15 bits is so many times finer than the first */
#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { FLOAT32, BFLOAT16, INT8 };

typedef struct {
    long first, outputs, rank;
    const float *b; /* (rank, outputs) */
} Adapter;

/* A matrix comes in units of 4 bytes, each of 1, 2 or 4 weights that meet neighbouring inputs. */
typedef struct {
    long kind, d_in, d_out, units;
    const Floats *weight;   /* (d_out / OUTPUTS, units, BLOCKS) of LANES units; those of int8 with 128 added */
    const float *scale;     /* (d_out), of int8 */
    const float *bias;      /* (d_out), or none */
    const float *a;         /* (rank, d_in), of all adapters */
    long rank, count;       /* of all adapters together; of adapters */
    const Adapter *adapters;
} Matrix;

typedef struct {
    float step;            /* of the second part; no number where one of the row is none */
    int32_t first, second; /* 128 times the sums of the parts: weights come with 128 added to them */
} Scale;

int understands(long kind) {
#ifdef __AVX512BF16__
    if (kind == BFLOAT16) return 1;
#endif
#ifdef __AVX512VNNI__
    if (kind == INT8) return 1;
#endif
    return kind == FLOAT32;
}

int outputs(void) { return OUTPUTS; }

/* Lay out the first `units` units of some rows, `stride` apart, in columns: (units, OUTPUTS), with zeros behind the last
   row. */
static void in_columns(const int32_t *rows, long count, long stride, long units, int32_t *columns) {
    long k = 0;
#ifdef __AVX512F__
    __m512i to_first[4], to_second[4]; /* halves of halves of squares change places */
    for (int step = 0; step < 4; step++) {
        int32_t first[LANES], second[LANES];
        for (int half = LANES / 2 >> step, lane = 0; lane < LANES; lane++) {
            first[lane] = lane & half ? LANES + lane - half : lane;
            second[lane] = lane & half ? LANES + lane : lane + half;
        }
        to_first[step] = _mm512_loadu_si512(first), to_second[step] = _mm512_loadu_si512(second);
    }
    for (; k + LANES <= units; k += LANES)
        for (long b = 0; b < OUTPUTS; b += LANES) {
            __m512i square[LANES];
            for (int r = 0; r < LANES; r++)
                square[r] = b + r < count ? _mm512_loadu_si512(rows + (b + r) * stride + k) : _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int step = 0; step < 4; step++)
#pragma GCC unroll 16
                for (int r = 0; r < LANES; r++)
                    if (!(r & LANES / 2 >> step)) {
                        __m512i first = square[r], second = square[r + (LANES / 2 >> step)];
                        square[r] = _mm512_permutex2var_epi32(first, to_first[step], second);
                        square[r + (LANES / 2 >> step)] = _mm512_permutex2var_epi32(first, to_second[step], second);
                    }
            for (int r = 0; r < LANES; r++) _mm512_storeu_si512(columns + (k + r) * OUTPUTS + b, square[r]);
        }
#endif
    for (long from = k; from < units; from += 16)
        for (long r = 0; r < OUTPUTS; r++)
            for (k = from; k < from + 16 && k < units; k++)
                columns[k * OUTPUTS + r] = r < count ? rows[r * stride + k] : 0;
}

/* Lay out (d_out, units) as a Matrix has it, in huge pages where `packed` begins with one: the system hands them out in
   half of the time, and what is read in one stream asks for fewer addresses. */
void pack(const int32_t *weight, long d_out, long units, int32_t *packed, long huge, int threads) {
    long whole = (d_out + OUTPUTS - 1) / OUTPUTS * OUTPUTS * units * 4 / huge * huge;
    if (whole && (uintptr_t)packed % huge == 0) madvise(packed, whole, MADV_HUGEPAGE); /* refused, it stays as it is */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long o = 0; o < d_out; o += OUTPUTS)
        in_columns(weight + o * units, d_out - o, units, units, packed + o * units);
}

INLINE Floats repeated(float x) { return x - (Floats){}; }

/* a · b + c, rounded once. Nothing else is fused: what a compiler may fuse here and not there would make a row's numbers
   depend on how many are computed beside it. */
INLINE Floats fused(Floats a, Floats b, Floats c) {
#ifdef __AVX512F__
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

static uint32_t in_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to the nearest, ties to even */
}

/* Write a row in bfloat16, two to a unit. */
static void in_pairs(const float *x, long d_in, long units, int32_t *row) {
    for (long k = 0; k < units; k++) {
        uint32_t last = 2 * k + 1 < d_in ? in_bfloat16(x[2 * k + 1]) : 0;
        row[k] = (int32_t)(in_bfloat16(x[2 * k]) | last << 16);
    }
}

/* Write a row in two parts of 8 bits, one behind the other. */
static Scale in_parts(const float *x, long d_in, long units, int32_t *row) {
    float largest = 1e-30f, nothing = 0;
    for (long k = 0; k < d_in; k++) largest = fmaxf(largest, fabsf(x[k])), nothing += 0 * x[k];
    float each = 127 * PART / largest;
    int32_t sums[2] = {0, 0};
    int8_t *first = (int8_t *)row, *second = (int8_t *)(row + units);
    for (long k = 0; k < 4 * units; k++) {
        int whole = k < d_in && nothing == 0 ? (int)rintf(x[k] * each) : 0;
        int coarse = (whole + PART / 2) >> 7, fine = whole - coarse * PART;
        first[k] = (int8_t)coarse, second[k] = (int8_t)fine;
        sums[0] += coarse, sums[1] += fine;
    }
    return (Scale){largest / (127 * PART) + nothing, 128 * sums[0], 128 * sums[1]};
}

INLINE Floats plus_product(const int kind, Floats sum, const int32_t *unit, Floats w) {
#ifdef __AVX512BF16__
    if (kind == BFLOAT16)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(*unit), (__m512bh)w);
#endif
#ifdef __AVX512VNNI__
    if (kind == INT8) return (Floats)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(*unit));
#endif
    float x;
    memcpy(&x, unit, 4);
    return fused(repeated(x), w, sum);
}

/* Write OUTPUTS outputs of some rows, or as many as there are. Not inlined: the sums of the products before it would not
   stay in registers. */
static __attribute__((noinline)) void finish(
    const Matrix *m, long rows, long o, const Floats (*sums)[BLOCKS], const Scale *scale, float *y) {
    long there = m->d_out - o < OUTPUTS ? m->d_out - o : OUTPUTS;
    Floats factors[BLOCKS] = {}, bias[BLOCKS] = {};
    if (m->scale) memcpy(factors, m->scale + o, 4 * there);
    if (m->bias) memcpy(bias, m->bias + o, 4 * there);
    for (long r = 0; r < rows; r++) {
        Floats found[BLOCKS];
        for (int b = 0; b < BLOCKS; b++) {
            if (m->kind == INT8) {
                Ints first = (Ints)sums[2 * r][b] - scale[r].first, second = (Ints)sums[2 * r + 1][b] - scale[r].second;
                Floats sum = PART * __builtin_convertvector(first, Floats) + __builtin_convertvector(second, Floats);
                found[b] = sum * scale[r].step * factors[b] + bias[b];
            } else
                found[b] = sums[r][b] + bias[b];
        }
        memcpy(y + r * m->d_out + o, found, 4 * there);
    }
}

/* Sum up OUTPUTS outputs of some rows, `stride` units apart, whose number is known to the compiler. */
INLINE void tile(const int kind, const int rows, const int32_t *x, long stride, const Floats *w, long units,
                 Floats (*found)[BLOCKS]) {
    Floats sums[ROWS][BLOCKS];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < BLOCKS; b++) sums[r][b] = (Floats){};
    for (long k = 0; k < units; k++, w += BLOCKS) {
        Floats of[BLOCKS];
        for (int b = 0; b < BLOCKS; b++) of[b] = w[b];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < BLOCKS; b++)
                sums[r][b] = plus_product(kind, sums[r][b], x + r * stride + k, of[b]);
    }
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < BLOCKS; b++) found[r][b] = sums[r][b];
}

/* In int8 a row's two parts count as rows. */
INLINE void rows_of(const int kind, const Matrix *m, long o, const int32_t *x, const Scale *scale, long rows, float *y) {
    const int each = kind == INT8 ? 2 : 1;
    const Floats *weight = m->weight + o / LANES * m->units;
    Floats found[ROWS][BLOCKS];
    long r = 0;
#define SOME(N)                                                                                              \
    for (; N <= ROWS && N % each == 0 && r + N / each <= rows; r += N / each) {                              \
        tile(kind, N <= ROWS ? N : 1, x + r * each * m->units, m->units, weight, m->units, found);           \
        finish(m, N / each, o, found, scale + r, y + r * m->d_out);                                          \
    }
    SOME(8) SOME(4) SOME(2) SOME(1)
#undef SOME
}

/* The sum of a vector's numbers: halves onto each other. */
INLINE float total(Floats x) {
    typedef float Half __attribute__((vector_size(2 * LANES)));
    typedef float Quarter __attribute__((vector_size(LANES)));
    Half half = *(Half *)&x + *((Half *)&x + 1);
    Quarter quarter = *(Quarter *)&half + *((Quarter *)&half + 1);
    float sum = 0;
    for (int lane = 0; lane < LANES / 4; lane++) sum += quarter[lane];
    return sum;
}

/* Some products of a row with rows of A. */
INLINE void dots(const int count, const float *x, const float *a, long d_in, float *found) {
    Floats sums[4] = {};
    long k = 0;
    for (; k + LANES <= d_in; k += LANES)
        for (int i = 0; i < count; i++)
            sums[i] = fused(*(const Floats *)(x + k), *(const Floats *)(a + i * d_in + k), sums[i]);
    for (int i = 0; i < count; i++) {
        float sum = total(sums[i]);
        for (long rest = k; rest < d_in; rest++) sum += x[rest] * a[i * d_in + rest];
        found[i] = sum;
    }
}

/* y += low B, LANES outputs or fewer of some rows. */
INLINE void add(const int rows, const float *low, long stride, const Adapter *of, long o, float *y, long d_out) {
    long there = of->outputs - o < LANES ? of->outputs - o : LANES;
    Floats sums[4], b = {};
    for (int r = 0; r < rows; r++) memcpy(sums + r, y + r * d_out + of->first + o, 4 * there);
    for (long k = 0; k < of->rank; k++) {
        memcpy(&b, of->b + k * of->outputs + o, 4 * there);
        for (int r = 0; r < rows; r++) sums[r] = fused(repeated(low[r * stride + k]), b, sums[r]);
    }
    for (int r = 0; r < rows; r++) memcpy(y + r * d_out + of->first + o, sums + r, 4 * there);
}

/* y (rows, d_out) = x (rows, d_in) through a matrix. Return 0, or 1 where there is no memory. */
int multiply(const Matrix *m, const float *x, long rows, float *y, int threads) {
    long each = (m->kind == INT8 ? 2 : 1) * m->units;
    int32_t *units = m->kind == FLOAT32 ? (int32_t *)x : malloc(4 * rows * each);
    Scale *scale = m->kind == INT8 ? malloc(rows * sizeof(Scale)) : NULL;
    float *low = m->count ? malloc(4 * rows * m->rank) : NULL;
    int lacks = !units || (m->kind == INT8 && !scale) || (m->count && !low);
    if (!lacks) {
#pragma omp parallel num_threads(threads)
        {
            if (m->kind != FLOAT32) {
#pragma omp for schedule(static)
                for (long r = 0; r < rows; r++) {
                    if (m->kind == INT8) scale[r] = in_parts(x + r * m->d_in, m->d_in, m->units, units + r * each);
                    else in_pairs(x + r * m->d_in, m->d_in, m->units, units + r * each);
                }
            }
#pragma omp for schedule(static)
            for (long o = 0; o < m->d_out; o += OUTPUTS) {
                if (m->kind == INT8) rows_of(INT8, m, o, units, scale, rows, y);
                else if (m->kind == BFLOAT16) rows_of(BFLOAT16, m, o, units, scale, rows, y);
                else rows_of(FLOAT32, m, o, units, scale, rows, y);
            }
            if (m->count) {
#pragma omp for collapse(2) schedule(static)
                for (long r = 0; r < rows; r++)
                    for (long k = 0; k < m->rank; k += 4) {
                        const float *of = x + r * m->d_in, *a = m->a + k * m->d_in;
                        if (k + 4 <= m->rank) dots(4, of, a, m->d_in, low + r * m->rank + k);
                        else for (long i = 0; k + i < m->rank; i++) dots(1, of, a + i * m->d_in, m->d_in, low + r * m->rank + k + i);
                    }
                long from = 0;
                for (long n = 0; n < m->count; from += m->adapters[n++].rank) {
                    const Adapter *of = m->adapters + n;
#pragma omp for schedule(static)
                    for (long o = 0; o < of->outputs; o += LANES) {
                        long r = 0;
                        for (; r + 4 <= rows; r += 4) add(4, low + r * m->rank + from, m->rank, of, o, y + r * m->d_out, m->d_out);
                        for (; r < rows; r++) add(1, low + r * m->rank + from, m->rank, of, o, y + r * m->d_out, m->d_out);
                    }
                }
            }
        }
    }
    if (m->kind != FLOAT32) free(units);
    free(scale), free(low);
    return lacks;
}

/* Add the sums of some rows to y, or write them. */
static __attribute__((noinline)) void put(
    long rows, const Floats (*sums)[BLOCKS], int more, float *y, long d_out, long there) {
    for (long r = 0; r < rows; r++, y += d_out) {
        Floats found[BLOCKS] = {};
        if (more) memcpy(found, y, 4 * there);
        for (int b = 0; b < BLOCKS; b++) found[b] += sums[r][b];
        memcpy(y, found, 4 * there);
    }
}

typedef struct {
    const float *x, *w;
    long d_in;
} Factors;

/* y (rows, d_out) = x (rows, d_in) Wᵀ of W (d_out, d_in), or x W of W (d_in, d_out), and of further factors likewise,
   summed up: of many rows, in float32, with W as it is. Some columns are laid out for all rows at a time. Return 0, or 1
   where there is no memory. */
int product(const Factors *factors, long count, long rows, long d_out, int by_rows, float *y, int threads) {
    int lacks = 0;
#pragma omp parallel num_threads(threads) reduction(| : lacks)
    {
        float *columns = aligned_alloc(64, 4 * DEPTH * OUTPUTS);
        lacks = !columns;
#pragma omp for schedule(static)
        for (long o = 0; o < d_out; o += OUTPUTS)
            for (const Factors *f = factors; columns && f < factors + count; f++)
                for (long from = 0; from < f->d_in; from += DEPTH) {
                    long depth = f->d_in - from < DEPTH ? f->d_in - from : DEPTH, r = 0;
                    long there = d_out - o < OUTPUTS ? d_out - o : OUTPUTS;
                    int more = from > 0 || f > factors;
                    if (by_rows)
                        in_columns((const int32_t *)f->w + o * f->d_in + from, there, f->d_in, depth, (int32_t *)columns);
                    for (long k = 0; k < depth && !by_rows; k++) {
                        memcpy(columns + k * OUTPUTS, f->w + (from + k) * d_out + o, 4 * there);
                        memset(columns + k * OUTPUTS + there, 0, 4 * (OUTPUTS - there));
                    }
                    const int32_t *x = (const int32_t *)f->x + from;
                    Floats found[ROWS][BLOCKS];
#define SOME(N)                                                                                      \
    for (; N <= ROWS && r + N <= rows; r += N) {                                                     \
        tile(FLOAT32, N <= ROWS ? N : 1, x + r * f->d_in, f->d_in, (Floats *)columns, depth, found); \
        put(N, found, more, y + r * d_out + o, d_out, there);                                        \
    }
                    SOME(8) SOME(4) SOME(2) SOME(1)
#undef SOME
                }
        free(columns);
    }
    return lacks;
}

/* y = x / sqrt(mean(x²) + eps) · weight, of rows of a width. */
void rms_norm(const float *x, long rows, long width, const float *weight, float eps, float *y) {
    for (long r = 0; r < rows; r++, x += width, y += width) {
        float squares = 0;
        dots(1, x, x, width, &squares);
        float factor = 1 / sqrtf(squares / width + eps);
        for (long k = 0; k < width; k++) y[k] = x[k] * factor * weight[k];
    }
}

/* eˣ of x ≤ 0 to float32's rounding, 0 below e⁻⁸⁷: Cephes' polynomial (Moshier 1992) behind e^x = 2^n e^r. */
INLINE Floats exponential(Floats x) {
    const float whole = 12582912; /* 1.5 · 2²³: what is added to it is rounded to a whole number */
    Ints there = ~(x < -87);      /* also of what is no number */
    Floats n = x * 1.44269504f + whole;
    Ints power = (Ints)n << 23;
    n -= whole;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f, p = repeated(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f, p = p * r * r + r + 1;
    return (Floats)((Ints)(p * (Floats)(power + (127 << 23))) & there);
}

/* Where some tokens stand that are appended to rows, and what they see. */
typedef struct {
    long rows, tokens, heads, groups, width, room, here; /* room: places of a row; here: those taken before */
    const float *cos, *sin;                              /* (rows, tokens, width); sin with rotate_half's signs */
    const uint8_t *mask;                                 /* (rows, here + tokens), or none: all is seen */
    float scale;
    int threads;
} Places;

INLINE void turn(const float *x, const float *cos, const float *sin, long width, float *y) {
    for (long i = 0; i < width / 2; i++) {
        y[i] = x[i] * cos[i] + x[i + width / 2] * sin[i];
        y[i + width / 2] = x[i + width / 2] * cos[i + width / 2] + x[i] * sin[i + width / 2];
    }
}

/* Add up some vectors of the values, each as often as its place weighs; return the sum of what all weigh. */
INLINE float weigh(const int count, const float *weights, const float *values, long width, long places, float *y) {
    Floats sums[4] = {};
    float sum = 0;
    for (long t = 0; t < places; t++, values += width) {
        sum += weights[t];
        for (int i = 0; i < count; i++) sums[i] = fused(repeated(weights[t]), ((const Floats *)values)[i], sums[i]);
    }
    for (int i = 0; i < count; i++) ((Floats *)y)[i] = sums[i];
    return sum;
}

/* What one head of one token finds. weights: room for as many as there are places, and LANES more. */
static void ask(const float *q, const float *keys, const float *values, const uint8_t *seen, long width, long places,
                float scale, float *weights, float *y) {
    float largest = -INFINITY, sum = 0;
    long t = 0, i = 0;
    for (; t + 4 <= places; t += 4) dots(4, q, keys + t * width, width, weights + t);
    for (; t < places; t++) dots(1, q, keys + t * width, width, weights + t);
    for (t = 0; t < places; t++) {
        if (seen && !seen[t] && t + 1 < places) weights[t] = -INFINITY; /* a place sees itself */
        weights[t] *= scale;
        largest = weights[t] > largest ? weights[t] : largest;
    }
    for (t = 0; t < places; t += LANES) {
        Floats *some = (Floats *)(weights + t);
        *some = exponential(*some - largest);
    }
    for (; i + 4 * LANES <= width; i += 4 * LANES) sum = weigh(4, weights, values + i, width, places, y + i);
    for (; i < width; i += LANES) sum = weigh(1, weights, values + i, width, places, y + i);
    for (long k = 0; k < width; k++) y[k] /= sum;
}

/* Append keys and values of the tokens, and write what they find; width is a multiple of LANES.

   projected: (rows, tokens, heads + 2 · groups, width), queries, keys and values. keys, values: (rows, groups, room,
   width). y: (rows, tokens, heads, width). Return 0, or 1 where there is no memory. */
int attend(const Places *p, const float *projected, float *keys, float *values, float *y) {
    long end = p->here + p->tokens, each = p->heads / p->groups, width = p->width;
    float *weights = malloc(4 * (p->rows * p->groups * (end + LANES + width)));
    if (!weights) return 1;
#pragma omp parallel for collapse(2) num_threads(p->threads) schedule(static)
    for (long r = 0; r < p->rows; r++)
        for (long g = 0; g < p->groups; g++) {
            float *own_keys = keys + (r * p->groups + g) * p->room * width;
            float *own_values = values + (r * p->groups + g) * p->room * width;
            float *room = weights + (r * p->groups + g) * (end + LANES + width), *q = room + end + LANES;
            for (long n = 0; n < p->tokens; n++) {
                long place = r * p->tokens + n, places = p->here + n + 1;
                const float *of = projected + place * (p->heads + 2 * p->groups) * width;
                const float *cos = p->cos + place * width, *sin = p->sin + place * width;
                turn(of + (p->heads + g) * width, cos, sin, width, own_keys + (places - 1) * width);
                memcpy(own_values + (places - 1) * width, of + (p->heads + p->groups + g) * width, 4 * width);
                for (long h = g * each; h < (g + 1) * each; h++) {
                    turn(of + h * width, cos, sin, width, q);
                    ask(q, own_keys, own_values, p->mask ? p->mask + r * end : NULL, width, places, p->scale, room,
                        y + (place * p->heads + h) * width);
                }
            }
        }
    free(weights);
    return 0;
}
