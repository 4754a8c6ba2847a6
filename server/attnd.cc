// attnd: the server with the implementations that come with it.
#include "server/run_server.h"

int main(int argc, char** argv) {
  return attn::server::RunServer(argc, argv, attn::BuiltInImplementations());
}
