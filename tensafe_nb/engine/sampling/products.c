/* y = s W x for a few rows x: W in int8, x in two parts of 8 bits, sums in 32 bits, by AVX-512 VNNI.
   y += B A x of adapters, in float32.

   Compiled on the user's machine where there is a compiler, see native.py. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 16 /* outputs of a vector */
#define PART 128 /* the second part is so many times finer than the first */

typedef struct {
    float step;            /* of the second part; no number where one of the row is none */
    int32_t first, second; /* 128 times the sums of the parts: weights come with 128 added to them */
} Row;

/* Write a row's two parts, in turns of four numbers: 4 of the first, 4 of the second, ... */
static Row in_parts(const float *x, long d_in, long width, int8_t *parts) {
    float largest = 1e-30f, nothing = 0;
    long sums[2] = {0, 0};
    for (long k = 0; k < d_in; k++) largest = fmaxf(largest, fabsf(x[k])), nothing += 0 * x[k];
    float each = 127 * PART / largest;
    for (long k = 0; k < width; k++) {
        int whole = k < d_in && nothing == 0 ? (int)rintf(x[k] * each) : 0;
        int first = (whole + PART / 2) >> 7, second = whole - first * PART;
        int8_t *place = parts + k / 4 * 8 + k % 4;
        place[0] = (int8_t)first, place[4] = (int8_t)second;
        sums[0] += first, sums[1] += second;
    }
    return (Row){largest / (127 * PART) + nothing, (int32_t)(128 * sums[0]), (int32_t)(128 * sums[1])};
}

/* Some blocks of outputs of some rows; both numbers are known to the compiler, and the sums lie in registers. */
static inline __attribute__((always_inline)) void block(
    const int blocks, const int rows, const Row *row, const int8_t *parts, long width,
    const uint8_t *weight, const float *scale, float *y, long d_out) {
    __m512i sums[blocks][rows][2];
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < rows; r++) sums[b][r][0] = sums[b][r][1] = _mm512_setzero_si512();
    for (long k = 0; k < width; k += 4)
        for (int b = 0; b < blocks; b++) {
            __m512i w = _mm512_loadu_si512(weight + b * width * BLOCK + k * BLOCK);
            for (int r = 0; r < rows; r++)
                for (int part = 0; part < 2; part++) {
                    int32_t four;
                    memcpy(&four, parts + r * 2 * width + 2 * k + 4 * part, 4);
                    sums[b][r][part] = _mm512_dpbusd_epi32(sums[b][r][part], w, _mm512_set1_epi32(four));
                }
        }
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < rows; r++) {
            __m512i first = _mm512_sub_epi32(sums[b][r][0], _mm512_set1_epi32(row[r].first));
            __m512i second = _mm512_sub_epi32(sums[b][r][1], _mm512_set1_epi32(row[r].second));
            __m512 sum = _mm512_fmadd_ps(
                _mm512_cvtepi32_ps(first), _mm512_set1_ps(PART), _mm512_cvtepi32_ps(second));
            sum = _mm512_mul_ps(sum, _mm512_set1_ps(row[r].step));
            _mm512_storeu_ps(
                y + r * d_out + b * BLOCK, _mm512_mul_ps(sum, _mm512_loadu_ps(scale + b * BLOCK)));
        }
}

/* Return 0, or 1 where there is no memory.

   x: (rows, d_in). weight: (d_out / 16, width / 4, 16, 4), each with 128 added; width ≥ d_in is a multiple of 4, d_out
   of 64. scale: (d_out). y: (rows, d_out). */
int int8_product(const float *x, long rows, long d_in, const uint8_t *weight, long width, const float *scale,
                 float *y, long d_out, int threads) {
    int8_t *parts = malloc(rows * 2 * width);
    Row *row = malloc(rows * sizeof(Row));
    if (!parts || !row) {
        free(parts), free(row);
        return 1;
    }
    for (long r = 0; r < rows; r++) row[r] = in_parts(x + r * d_in, d_in, width, parts + r * 2 * width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long o = 0; o < d_out; o += 4 * BLOCK) {
        const uint8_t *of = weight + o * width;
        long r = 0;
        for (; r + 2 <= rows; r += 2)
            block(4, 2, row + r, parts + r * 2 * width, width, of, scale + o, y + r * d_out + o, d_out);
        if (r < rows)
            block(4, 1, row + r, parts + r * 2 * width, width, of, scale + o, y + r * d_out + o, d_out);
    }
    free(parts), free(row);
    return 0;
}

/* Some products of a row with rows of A, each added up in the same order whoever is beside it. */
static inline __attribute__((always_inline)) void dots(
    const int count, const float *x, const float *a, long d_in, float *found) {
    __m512 sums[count];
    for (int i = 0; i < count; i++) sums[i] = _mm512_setzero_ps();
    for (long k = 0; k < d_in; k += BLOCK) {
        __mmask16 there = d_in - k < BLOCK ? (1 << (d_in - k)) - 1 : 0xffff;
        __m512 of = _mm512_maskz_loadu_ps(there, x + k);
        for (int i = 0; i < count; i++)
            sums[i] = _mm512_fmadd_ps(of, _mm512_maskz_loadu_ps(there, a + i * d_in + k), sums[i]);
    }
    for (int i = 0; i < count; i++) found[i] = _mm512_reduce_add_ps(sums[i]);
}

/* y += B low of some rows. b: (rank, width). */
static inline __attribute__((always_inline)) void add(
    const int rows, const float *low, long rank, const float *b, long width, float *y, long d_out) {
    for (long o = 0; o < width; o += BLOCK) {
        __mmask16 there = width - o < BLOCK ? (1 << (width - o)) - 1 : 0xffff;
        __m512 sums[rows];
        for (int r = 0; r < rows; r++) sums[r] = _mm512_maskz_loadu_ps(there, y + r * d_out + o);
        for (long k = 0; k < rank; k++) {
            __m512 of = _mm512_maskz_loadu_ps(there, b + k * width + o);
            for (int r = 0; r < rows; r++)
                sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(low[r * rank + k]), of, sums[r]);
        }
        for (int r = 0; r < rows; r++) _mm512_mask_storeu_ps(y + r * d_out + o, there, sums[r]);
    }
}

/* y: (rows, d_out), of which `width` numbers from where it points get theirs. x: (rows, d_in). a: (rank, d_in).
   b: (rank, width). low: (rows, rank), room to work in. */
void add_adapter(const float *x, long rows, long d_in, const float *a, long rank, const float *b, long width,
                 float *low, float *y, long d_out) {
    for (long r = 0; r < rows; r++) {
        long k = 0;
        for (; k + 4 <= rank; k += 4) dots(4, x + r * d_in, a + k * d_in, d_in, low + r * rank + k);
        for (; k < rank; k++) dots(1, x + r * d_in, a + k * d_in, d_in, low + r * rank + k);
    }
    long r = 0;
    for (; r + 4 <= rows; r += 4) add(4, low + r * rank, rank, b, width, y + r * d_out, d_out);
    for (; r < rows; r++) add(1, low + r * rank, rank, b, width, y + r * d_out, d_out);
}
