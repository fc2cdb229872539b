/* Put before every file of llama.cpp when it is compiled (environment.py). GCC 12's _tile_loadconfig tells the optimiser
   that it reads 8 bytes of the 64-byte configuration; the stores to the other 56 are then dropped, and the first AMX
   instruction of llama.cpp ends the process with a segmentation fault. Here it reads all 64. */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ <= 12
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
