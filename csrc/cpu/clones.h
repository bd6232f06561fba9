// One binary for every x86-64 level: marked functions are compiled once per level and chosen when the library loads.
#pragma once

// `flatten` pulls the templates that do the work into the clone; a template itself cannot be cloned.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOMENT_OPS_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), flatten, noinline))
#else
#define MOMENT_OPS_CLONES __attribute__((noinline))
#endif
