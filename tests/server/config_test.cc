// Configuration files and addresses: what is refused, and that the message says where.
#include "server/config.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>

#include "server/listen_address.h"

namespace attn::server {
namespace {

absl::StatusOr<ServerConfig> Read(const std::string& text) {
  const std::string path = testing::TempDir() + "/attnd_config_test.textproto";
  std::ofstream(path) << text;
  absl::StatusOr<ServerConfig> config = ReadConfigFile(path);
  std::remove(path.c_str());
  return config;
}

bool Mentions(const absl::Status& status, const std::string& text) {
  return std::string(status.message()).find(text) != std::string::npos;
}

TEST(ConfigTest, ReadsTextFormat) {
  const auto config = Read("listen: '127.0.0.1:0'\nmodels { directory: 'd' spec { name: 'm' } }\n");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->models(0).spec().name(), "m");
}

TEST(ConfigTest, SaysFileLineAndFieldOfAnError) {
  const auto unknown = Read("threads: 2\nthreds: 3\n").status();
  EXPECT_TRUE(Mentions(unknown, ".textproto:2:")) << unknown;
  EXPECT_TRUE(Mentions(unknown, "threds")) << unknown;
  const auto range = Read("threads: 2\n\nexecutor_spin_microseconds: 20000\n").status();
  EXPECT_TRUE(Mentions(range, ".textproto:3:")) << range;
  EXPECT_TRUE(Mentions(range, "executor_spin_microseconds")) << range;
  const auto listen = Read("listen: '127.0.0.1:1'\nlisten: '0.0.0.0:1'\n").status();
  EXPECT_TRUE(Mentions(listen, ".textproto:2:")) << listen;
  const auto twice =
      Read("models { spec { name: 'm' } }\nmodels { spec { name: 'm' } }\n").status();
  EXPECT_TRUE(Mentions(twice, ".textproto:2:")) << twice;
  EXPECT_FALSE(ReadConfigFile("/nowhere").ok());
}

TEST(ConfigTest, FillsInDefaults) {
  ServerConfig config;
  ASSERT_TRUE(CompleteConfig(config).ok());
  EXPECT_EQ(config.max_message_bytes(), 64u << 20);
  EXPECT_GE(config.threads(), 1u);
  EXPECT_EQ(config.listen_size(), 1);
}

TEST(ListenAddressTest, PlaintextStaysOnTheMachineUnlessAllowed) {
  for (const char* address :
       {"127.0.0.1:0", "127.1.2.3:80", "localhost:1", "[::1]:7700", "unix:/tmp/s"}) {
    EXPECT_TRUE(CheckListenAddress(address, false).ok()) << address;
  }
  for (const char* address : {"0.0.0.0:1", "10.0.0.1:1", "[::]:1", "example.org:1"}) {
    EXPECT_FALSE(CheckListenAddress(address, false).ok()) << address;
    EXPECT_TRUE(CheckListenAddress(address, true).ok()) << address;
  }
  for (const std::string& address :
       {std::string("127.0.0.1"), std::string(":1"), std::string("127.0.0.1:70000"),
        std::string("127.0.0.1:x"), std::string("unix:"), "unix:/" + std::string(200, 'x')}) {
    EXPECT_FALSE(CheckListenAddress(address, true).ok()) << address;
  }
}

}  // namespace
}  // namespace attn::server
