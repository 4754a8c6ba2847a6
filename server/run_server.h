// The server as a program, for mains that bring implementations of their own.
#pragma once

#include "core/attention_implementation.h"

namespace attn::server {

// What main does: reads the configuration from the command line, serves with the implementations of
// `table` until SIGTERM or SIGINT, and drains; a second signal ends the process at once. Before
// that it may start the program again, with a setting that LibTorch reads before main: nothing of
// the caller's may have happened that must not happen twice. Returns the exit status. The table
// lives as long as the process.
int RunServer(int argc, char** argv, ImplementationTable table);

}  // namespace attn::server
