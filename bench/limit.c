/* How fast multiply-adds can go on this machine: loops that touch nothing but registers, on so many threads at once.

       cc -O3 -pthread limit.c -o limit && ./limit THREADS SECONDS

   Prints a line of JSON for float32 and one for bfloat16 (with float32 sums): the multiplications and additions a
   second, in 1e9, and the instructions that made them; null where the processor has none. A line is written as soon as
   its figure is there, and stays if the program dies later. Many sums run side by side, so that no instruction waits
   for the one before it; nothing is loaded, and nothing is stored. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define ROUNDS 20000                /* of a kernel between two looks at the clock */
#define HIDE(x) __asm__("" : "+m"(x)) /* keeps the compiler from knowing a value, and from computing it beforehand */

typedef double (*Kernel)(void); /* returns the multiplications and additions that one call makes */

#define SUMS(count, type, start, lanes, step)                     \
    type sum[count];                                              \
    for (int i = 0; i < (count); i++) sum[i] = (start);           \
    for (long round = 0; round < ROUNDS; round++) {               \
        _Pragma("GCC unroll 32") for (int i = 0; i < (count); i++) sum[i] = (step); \
        __asm__ volatile("");                                     \
    }                                                             \
    for (int i = 0; i < (count); i++) HIDE(sum[i]);               \
    return 2.0 * ROUNDS * (count) * (lanes)

/* any processor: four lanes by the compiler's own vectors; where fused multiply-adds need a flag it makes two steps */
typedef float four __attribute__((vector_size(16)));
static double portable(void) {
    four factor = {0.5f, 0.5f, 0.5f, 0.5f}, term = {1, 1, 1, 1};
    HIDE(factor);
    HIDE(term);
    SUMS(12, four, term, 4, sum[i] * factor + term);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static double avx2(void) {
    __m256 factor = _mm256_set1_ps(0.5f), term = _mm256_set1_ps(1);
    HIDE(factor);
    HIDE(term);
    SUMS(12, __m256, term, 8, _mm256_fmadd_ps(sum[i], factor, term));
}

__attribute__((target("avx512f"))) static double avx512(void) {
    __m512 factor = _mm512_set1_ps(0.5f), term = _mm512_set1_ps(1);
    HIDE(factor);
    HIDE(term);
    SUMS(24, __m512, term, 16, _mm512_fmadd_ps(sum[i], factor, term));
}

/* each of 16 lanes takes two products a step */
__attribute__((target("avx512f,avx512bf16"))) static double avx512_bf16(void) {
    __m512 zero = _mm512_setzero_ps();
    __m512i ones = _mm512_set1_epi16(0x3f80); /* 1 in bfloat16 */
    HIDE(ones);
    __m512bh one;
    memcpy(&one, &ones, sizeof one);
    SUMS(24, __m512, zero, 32, _mm512_dpbf16_ps(sum[i], one, one));
}

/* The 64 bytes that LDTILECFG reads (Intel's manual, volume 2): eight tiles of 16 rows of 64 bytes. */
typedef struct { unsigned char palette, start, unused[14]; unsigned short bytes[16]; unsigned char rows[16]; } Shapes;
static const Shapes shapes __attribute__((aligned(64))) = {
    .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

/* A tile instruction multiplies 16 x 32 by 32 x 16. The shapes are given to the instruction whole: _tile_loadconfig of
   GCC 12 tells the optimiser of their first 8 bytes only, which then leaves the rest of a local unwritten, and the
   processor refuses what lies there with a segmentation fault. */
__attribute__((target("amx-tile,amx-bf16"))) static double amx_bf16(void) {
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
    for (long round = 0; round < ROUNDS; round++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 2.0 * ROUNDS * 4 * 16 * 16 * 32;
}

static int has_amx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* Linux lends the tiles to whom asks */
}
#endif

/* The thread's own processor time, so that a limit is found where other programs run too. */
static double now(void) {
    struct timespec moment;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &moment);
    return moment.tv_sec + 1e-9 * moment.tv_nsec;
}

static pthread_barrier_t together;
static double wanted;

typedef struct { pthread_t thread; Kernel kernel; double rate; } Worker;

static void *work(void *given) {
    Worker *worker = given;
    worker->kernel();
    pthread_barrier_wait(&together);
    double began = now(), done = 0;
    while (now() - began < wanted) done += worker->kernel();
    worker->rate = done / (now() - began);
    return NULL;
}

static double rate(Kernel kernel, int threads) {
    Worker *workers = calloc(threads, sizeof *workers);
    double sum = 0;
    pthread_barrier_init(&together, NULL, threads);
    for (int i = 0; i < threads; i++) {
        workers[i].kernel = kernel;
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i])) exit(1); /* the others would wait for ever */
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(workers[i].thread, NULL);
        sum += workers[i].rate;
    }
    free(workers);
    return sum / 1e9;
}

static void print_rate(const char *format, const char *by, Kernel kernel, int threads) {
    if (kernel) printf("{\"%s\": %.1f, ", format, rate(kernel, threads));
    else printf("{\"%s\": null, ", format);
    printf("\"%s by\": \"%s\"}\n", format, by);
    fflush(stdout);
}

int main(int count, char **given) {
    int threads = count > 1 ? atoi(given[1]) : 1;
    wanted = count > 2 ? atof(given[2]) : 0.5;
    Kernel single = portable, half = NULL;
    const char *single_by = "portable vectors of 4", *half_by = "none";
    if (threads < 1) return 1;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) single = avx2, single_by = "AVX2 FMA";
    if (__builtin_cpu_supports("avx512f")) single = avx512, single_by = "AVX-512 FMA";
    if (__builtin_cpu_supports("avx512bf16")) half = avx512_bf16, half_by = "AVX-512 BF16";
    if (has_amx()) half = amx_bf16, half_by = "AMX BF16";
#endif
    print_rate("float32", single_by, single, threads);
    print_rate("bf16", half_by, half, threads);
    return 0;
}
