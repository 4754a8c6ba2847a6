// attnd with one implementation more.
#include "server/run_server.h"
#include "tests/extension/extended_table.h"

int main(int argc, char** argv) {
  return attn::server::RunServer(argc, argv, attn::ExtendedImplementations());
}
