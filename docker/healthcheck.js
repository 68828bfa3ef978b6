// Run by compose's health check in the mongo container, with mongosh, every few seconds.
// The credentials come from the container's environment, so that no process list shows them.
// Exit code 0 only when this node is the primary of its replica set.
const admin = db.getSiblingDB("admin");
admin.auth(process.env.MONGO_INITDB_ROOT_USERNAME, process.env.MONGO_INITDB_ROOT_PASSWORD);

try {
  rs.status();
} catch (error) {
  if (error.codeName !== "NotYetInitialized") {
    throw error;
  }
  rs.initiate({ _id: "rs0", members: [{ _id: 0, host: "localhost:27017" }] });
}

quit(db.hello().isWritablePrimary ? 0 : 1);
